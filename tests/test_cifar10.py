"""environments/cifar10.py on small archives of the same format, served on this machine."""

import functools
import gzip
import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from environments import cifar10

COUNT = 7  # records of a batch
NAMES = [f"cifar-10-batches-bin/{name}.bin" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (6 * COUNT, 32, 32, 3), np.uint8)  # as pictures are usually kept: colour last
LABELS = rng.permutation(np.arange(6 * COUNT) % 10)


def record(label: int, image: np.ndarray) -> bytes:
    return bytes([label]) + b"".join(image[:, :, colour].tobytes() for colour in range(3))


RECORDS = [record(*pair) for pair in zip(LABELS, IMAGES, strict=True)]
BATCHES = {name: b"".join(RECORDS[i * COUNT : (i + 1) * COUNT]) for i, name in enumerate(NAMES)}


def tar(members: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def links() -> bytes:
    """Every batch is a symbolic link out of the archive."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        for name in NAMES:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
    return buffer.getvalue()


TAR = tar(BATCHES)
compress = functools.partial(gzip.compress, mtime=0)  # the same bytes, and so names of tests, in every process
GOOD = compress(TAR)
FLIPPED = bytes([*GOOD[:-8], GOOD[-8] ^ 1, *GOOD[-7:]])  # in gzip's checksum


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's `status`, `body`, `length` and `hangs` say."""

    def do_GET(self):
        self.server.requests += 1
        self.send_response(self.server.status)
        if self.server.length:
            self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.body)
        if self.server.hangs:
            self.wfile.flush()
            self.rfile.read(1)  # until the client gives up

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.status, server.body, server.length, server.hangs, server.requests = 200, GOOD, None, False, 0
        server.url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def fails(kind: type[Exception], *args) -> str:
    """The one-line message of the error that `load` raises."""
    with pytest.raises(kind) as caught:
        cifar10.load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stored(folder, data: bytes):
    path = folder / "cifar-10-binary.tar.gz"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("length", [None, len(GOOD)])
def test_every_pixel_and_label_arrives_and_the_archive_is_downloaded_once(server, tmp_path, length):
    server.length, folder = length, tmp_path / "a" / "b"
    for _ in range(2):
        loaded = cifar10.load(str(folder), server.url, md5(GOOD))
        images, labels, test_images, test_labels = loaded
        np.testing.assert_array_equal(np.concatenate((images, test_images)), IMAGES.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(np.concatenate((labels, test_labels)), LABELS)
        assert [array.dtype for array in loaded] == [np.uint8, np.int64] * 2
        assert images.shape == (5 * COUNT, 3, 32, 32) and test_images.shape == (COUNT, 3, 32, 32)
        assert all(array.flags.writeable and array.flags.c_contiguous for array in loaded)
        assert [path.name for path in folder.iterdir()] == ["cifar-10-binary.tar.gz"]
        server.shutdown()
        server.server_close()
    assert server.requests == 1


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ({"length": len(GOOD) + 5}, FileNotFoundError, f"only {len(GOOD)} of {len(GOOD) + 5} bytes arrived"),
        ({"status": 404}, FileNotFoundError, "404"),
        ({"status": 503, "body": b""}, FileNotFoundError, "503"),
        ({"length": len(GOOD) + 5, "hangs": True}, FileNotFoundError, "timed out"),
        ({"length": "many"}, FileNotFoundError, "many"),
        ({"body": GOOD[:-5]}, ValueError, f"has md5 {md5(GOOD[:-5])}, not {md5(GOOD)}"),
    ],
)
def test_a_failed_download_says_what_to_do_and_leaves_nothing(server, tmp_path, monkeypatch, answer, kind, reason):
    if "hangs" in answer:
        monkeypatch.setattr(cifar10, "TIMEOUT", 0.2)
    vars(server).update(answer)
    message = fails(kind, tmp_path, server.url, md5(GOOD))
    assert all(part in message for part in (server.url, reason, f"{tmp_path / 'cifar-10-binary.tar.gz'}"))
    assert not list(tmp_path.iterdir())


def test_no_server_says_what_to_do_and_leaves_nothing(server, tmp_path):
    server.shutdown()
    server.server_close()
    message = fails(FileNotFoundError, tmp_path, server.url, md5(GOOD))
    assert server.url in message and "refused" in message and f"{tmp_path / 'cifar-10-binary.tar.gz'}" in message
    assert not list(tmp_path.iterdir())


def test_a_wrong_checksum_on_disk_names_both_and_says_to_delete_the_file(tmp_path):
    path = stored(tmp_path, GOOD)
    message = fails(ValueError, tmp_path)
    assert all(part in message for part in (str(path), md5(GOOD), cifar10.MD5, "delete"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "damaged at its start"),
        (b"no gzip at all", "damaged at its start"),
        (compress(b"no tar at all"), "damaged at its start"),
        (GOOD[:1000] + bytes(1000) + GOOD[2000:], "damaged in or after its member 'cifar-10-batches-bin/"),
        (GOOD[:75_000].ljust(len(GOOD), b"\xff"), "damaged in or after its member 'cifar-10-batches-bin/"),
        (GOOD[: len(GOOD) // 2], "damaged in or after its member 'cifar-10-batches-bin/data_batch_3.bin'"),
        (GOOD[:-4], f"damaged in or after its member '{NAMES[-1]}'"),
        (FLIPPED, f"damaged in or after its member '{NAMES[-1]}'"),
        (compress(TAR[: len(TAR) // 2]), "damaged in or after its member 'cifar-10-batches-bin/data_batch_"),
        *((compress(tar(BATCHES | {name: b""})), f"{name} has 0 bytes") for name in NAMES),
        *((compress(tar({k: v for k, v in BATCHES.items() if k != name})), f"lacks {name}") for name in NAMES),
        (compress(links()), f"lacks {NAMES[0]}"),
        (compress(tar(BATCHES | {NAMES[2]: BATCHES[NAMES[2]][:-1]})), f"{NAMES[2]} has {7 * 3073 - 1} bytes"),
        (compress(tar(BATCHES | {NAMES[5]: b"\x0a" + bytes(3072)})), f"{NAMES[5]} has the label 10"),
    ],
)
def test_a_damaged_archive_is_named_with_its_member(tmp_path, data, reason):
    path = stored(tmp_path, data)
    message = fails(ValueError, tmp_path, cifar10.URL, md5(data))
    assert str(path) in message and reason in message


def test_other_members_are_ignored_and_nothing_is_written(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    evil = dict.fromkeys(("../../evil", f"{tmp_path}/evil", f"../{NAMES[0]}", "data_batch_1.bin"), b"evil")
    data = compress(tar(evil | BATCHES))
    path = stored(folder, data)
    images, *_ = cifar10.load(folder, cifar10.URL, md5(data))
    np.testing.assert_array_equal(images, IMAGES[: 5 * COUNT].transpose(0, 3, 1, 2))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
