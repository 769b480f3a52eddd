"""worldmodel_a2c.py in stages: a fifth of `--total-timesteps` for vision, a fifth for memory, the rest for everything,
each to the end of its last rollout. In the first two the untrained policy acts; in each the learning rate falls to 0.
Other flags are the script's, for each stage; the output is the last stage's, but `global_step` counts all.

    python benchmark/worldmodel_stages.py --total-timesteps 100000

`python benchmark/learning.py carracing` runs it beside training end to end.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).parent.parent / "worldmodel_a2c.py")


def train(flags: list[str], steps: int, stage: str, checkpoint: str | None) -> dict:
    """The closing summary of one stage."""
    command = [sys.executable, SCRIPT, *flags, "--stage", stage, "--total-timesteps", str(steps)]
    command += ["--init-from", checkpoint] if checkpoint else []
    command += ["--eval-episodes", "1"] if stage != "all" else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-timesteps", type=int, required=True)
    args, flags = parser.parse_known_args()
    steps, result, checkpoint = 0, {}, None
    for stage, share in (("vision", 0.2), ("memory", 0.2), ("all", 0.6)):
        result = train(flags, int(share * args.total_timesteps), stage, checkpoint)
        steps += result["global_step"]
        checkpoint = f"{result['run_dir']}/checkpoint.pt"
    print(json.dumps(result | {"global_step": steps}))


if __name__ == "__main__":
    main()
