"""Names of the folders of a sweep's jobs."""

import hashlib
import re

LONGEST = 160  # bytes; file systems take 255, and some that encrypt names take less


def folder_name(text: str) -> str:
    """A sweep job's folder: its overrides, in signs that every file system and a link can take, and short enough.

    What is left out or cut is told by a hash, so that two jobs never share a name.
    """
    name = re.sub(r"[\"']", "", str(text)) or "job"
    name = re.sub(r"[^\w=,.+@~()-]|\.$", "-", name).encode(errors="replace")
    if len(name) > LONGEST:
        name = name[: LONGEST - 10].decode(errors="ignore").encode()
    digest = hashlib.sha256(str(text).encode(errors="surrogatepass")).hexdigest()[:8]
    return name.decode() if name.decode() in (text, "job") else f"{name.decode()}_{digest}"
