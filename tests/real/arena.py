"""PegaEngine's arena, opened from outside to look at it and to damage it."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

PAGE = 4096
CHUNK_READ = 1 << 20


class Arena:
    """The memfd that pegaflow holds."""

    def __init__(self, pegaflow_pid: int):
        fds = Path(f"/proc/{pegaflow_pid}/fd")
        links = {}
        for fd in fds.iterdir():
            # Connections come and go meanwhile.
            with suppress(FileNotFoundError):
                links[fd] = os.readlink(fd)
        arenas = [fd for fd, target in links.items() if target.startswith("/memfd:pegaflow")]
        assert arenas, f"pegaflow holds no memfd; its descriptors: {sorted(links.values())}"
        self.file = os.open(arenas[0], os.O_RDWR)
        self.size = os.fstat(self.file).st_size

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def pages(self) -> dict[int, bytes]:
        """A digest of every page that was ever written, by offset."""
        found = {}
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self.file, at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(self.file, start, os.SEEK_HOLE)
            for offset in range(start, at, CHUNK_READ):
                block = os.pread(self.file, min(CHUNK_READ, at - offset), offset)
                for inner in range(0, len(block), PAGE):
                    page = block[inner : inner + PAGE]
                    found[offset + inner] = hashlib.blake2b(page, digest_size=8).digest()
        return found

    def changed_since(self, before: dict[int, bytes]) -> list[int]:
        """Offsets of the pages that were written since."""
        now = self.pages()
        return sorted(offset for offset, digest in now.items() if before.get(offset) != digest)

    def flip(self, offset: int) -> None:
        """Flips one bit of one byte."""
        (byte,) = os.pread(self.file, 1, offset)
        os.pwrite(self.file, bytes([byte ^ 0x04]), offset)

    def damage(self, offset: int) -> None:
        """Flips one bit of the exponent of every 16-bit float in a page."""
        page = bytearray(os.pread(self.file, PAGE, offset))
        for index in range(1, PAGE, 2):
            page[index] ^= 0x04
        os.pwrite(self.file, bytes(page), offset)
