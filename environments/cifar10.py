"""CIFAR-10 from its official binary archive, which is downloaded once. It is unpacked in memory, never to disk."""

import gzip
import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
TRAIN = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
TEST = ["cifar-10-batches-bin/test_batch.bin"]
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, the green and the blue plane, each row by row
TIMEOUT = 30  # seconds without a byte


def load(data_dir: str | Path, url: str = URL, md5: str = MD5) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train images uint8 [50000, 3, 32, 32] and labels int64 [50000], then test images and labels (10000).

    Raises:
        FileNotFoundError: the archive is not in `data_dir` and cannot be downloaded.
        ValueError: the archive has another checksum, is damaged, or does not hold what it should.
    """
    path = Path(data_dir, "cifar-10-binary.tar.gz")
    if not path.exists():
        download(url, path, md5)
    if (found := md5_of(path)) != md5:
        raise ValueError(f"{path} has md5 {found}, not {md5}: delete the file and load again")
    members = read(path)
    return *arrays(path, members, TRAIN), *arrays(path, members, TEST)


def parts(data_dir: str | Path) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, int], ...]]:
    """All images and labels, and where those to train, to validate and to test begin and end: 45,000, and the first
    1,000 of 5,000 and 2,000 of 10,000."""
    train, train_labels, test, test_labels = load(data_dir)
    n, last = len(train), len(train) * 9 // 10
    ends = (0, last), (last, min(n, last + 1000)), (n, n + min(len(test), 2000))
    return np.concatenate((train, test)), np.concatenate((train_labels, test_labels)), ends


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def download(url: str, path: Path, md5: str) -> None:
    """All or nothing: it is fetched and verified in a temporary folder beside `path`, then moved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, path.name)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, part.open("wb") as file:
                total = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(response, "read", total=total or None, desc=path.name) as body:
                    shutil.copyfileobj(body, file)
            if (size := part.stat().st_size) < total:
                raise OSError(f"only {size} of {total} bytes arrived")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise FileNotFoundError(f"cannot download {url} ({error}): put the file at {path} by hand") from error
        if (found := md5_of(part)) != md5:
            raise ValueError(f"{url} has md5 {found}, not {md5}, and was deleted: try again or put the file at {path}")
        part.replace(path)


def read(path: Path) -> dict[str, bytes]:
    """The archive's batches by name. Whatever else it holds is skipped."""
    members, where = {}, "at its start"
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                where = f"in or after its member {member.name!r}"
                if member.isfile() and member.name in TRAIN + TEST:
                    members[member.name] = tar.extractfile(member).read()
            file.read()  # up to gzip's own checksum, which comes last
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged {where} ({error}): delete the file and load again") from error
    return members


def arrays(path: Path, members: dict[str, bytes], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the batches with these names, one after the other."""
    batches = []
    for name in names:
        if name not in members:
            raise ValueError(f"{path} lacks {name}: delete the file and load again")
        if (size := len(members[name])) % RECORD or not size:
            raise ValueError(f"{path}: {name} has {size} bytes, not one or more records of {RECORD}: delete the file")
        batches.append(np.frombuffer(members[name], np.uint8).reshape(-1, RECORD))
        if (label := batches[-1][:, 0].max()) > 9:
            raise ValueError(f"{path}: {name} has the label {label}, which is above 9: delete the file")
    images = np.concatenate([batch[:, 1:] for batch in batches]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([batch[:, 0] for batch in batches]).astype(np.int64)
