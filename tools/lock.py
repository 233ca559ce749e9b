"""Write constraints.txt and requirements/*.txt, the exact versions that dstrain is tested with: ``make lock``.

uv resolves for every Python that pyproject.toml allows and for every platform at once. Versions that stand in
constraints.txt stay where they still fit. Arguments go to uv (``make lock UPGRADE="--upgrade-package transformers"``),
but for one of the form ``torch==2.14.1``: torch moves only when it is named, since it brings gigabytes of CUDA along.

``python -m tools.lock own-torch --find-links FOLDER > requirements/own-torch.txt`` writes what requirements/torch.txt
is, for another build of torch of the same version: one for CPUs, or for another CUDA. Its further arguments are uv's,
and say where that build lies (``--index URL``) and for which Python it is (``--python-version 3.12``).

No address of a registry is written. uv asks PyPI, or the index that ``UV_DEFAULT_INDEX`` names; it must be one that
serves PyPI's own files, since their hashes are written.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LOCKS = ROOT / "requirements"

# The lowest Python that pyproject.toml allows.
UNIVERSAL = ("--universal", "--python-version", "3.10", "--no-annotate", "--no-header")
WRITTEN = "# Written by `make lock`; don't edit.\n"
HEADS = {
    "constraints.txt": """\
# The versions that dstrain is tested with: pip install -c constraints.txt -e '.[dev]'
# A constraint installs nothing by itself. The packages of CUDA (cuda-*, nvidia-*, triton) are what PyPI's torch for
# Linux brings along; a build of torch for CPUs does without them. requirements/ holds the same versions with hashes.
""",
    "build.txt": """\
# What builds dstrain's wheel, and writes the image's bill of materials, with hashes:
# pip install --require-hashes -r requirements/build.txt
""",
    "torch.txt": """\
# PyPI's torch with all that it needs, with hashes: pip install --require-hashes -r requirements/torch.txt
# For Linux that is the build for NVIDIA GPUs, with gigabytes of CUDA. A build for CPUs, or for another CUDA, comes from
# another index and has other hashes: install that one by its version instead, then requirements/runtime.txt.
""",
    "own-torch": """\
# torch with all that it needs, with hashes, from where `python -m tools.lock own-torch` was told to look.
""",
    "runtime.txt": """\
# What dstrain needs beside torch, with hashes. Install torch first (requirements/torch.txt, or another build of the
# same version), then: pip install --require-hashes -r requirements/runtime.txt
""",
    "extras.txt": """\
# What dstrain's extras (dev and so on) add to requirements/runtime.txt, with hashes:
# pip install --require-hashes -r requirements/runtime.txt -r requirements/extras.txt
""",
}


# A package that a file holds for Pythons below one.
_OLD_PYTHONS = r"^([\w.-]+)==\S+ ; python_full_version < '([\d.]+)' \\$"


def compile_requirements(*sources: str, options: list[str]) -> str:
    """A resolution for every Python and every platform. Raises SystemExit as ``run_uv`` does."""
    return run_uv(*sources, *UNIVERSAL, *options)


def run_uv(*words: str) -> str:
    """What ``uv pip compile`` prints. Raises SystemExit with its code: it has said why."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def pinned(package: str) -> str:
    """A package as it stands in constraints.txt, without its marker."""
    [found] = re.findall(rf"^{package}==[^\s;]+", CONSTRAINTS.read_text(), re.MULTILINE)
    return str(found)


def resolve(torch: str, options: list[str]) -> dict[str, str]:
    """The new content of each file, by its name, without its head.

    Args:
        torch: its version, such as ``torch==2.13.0``.
        options: uv's, for the resolution that all files share.
    """
    with tempfile.TemporaryDirectory() as folder:

        def file(name: str, content: str) -> str:
            path = Path(folder) / name
            path.write_text(content)
            return str(path)

        fixed = ["--constraints", file("fixed.txt", torch)]
        # Versions that stand in the output file already are kept by uv where they fit.
        all_pins = file("constraints.txt", CONSTRAINTS.read_text())
        everything = ["pyproject.toml", "--all-extras"]
        compile_requirements(*everything, options=[*fixed, "--output-file", all_pins, *options])

        hashed = ["--constraints", all_pins, "--generate-hashes"]
        without_torch = [*hashed, "--excludes", file("excludes.txt", "torch")]
        runtime = compile_requirements("pyproject.toml", options=without_torch)
        # One that runtime.txt has for some platforms or for old Pythons only stands in extras.txt too, for the others.
        in_runtime = re.findall(r"^([\w.-]+)==(?!.*sys_platform ==)", runtime, re.MULTILINE)
        everywhere = re.findall(r"^([\w.-]+)==\S+$", Path(all_pins).read_text(), re.MULTILINE)
        in_part = {
            name: low for name, low in re.findall(_OLD_PYTHONS, runtime, re.MULTILINE) if name in everywhere
        }
        the_others = [
            word for name in in_runtime if name not in in_part for word in ("--no-emit-package", name)
        ]
        extras = compile_requirements(*everything, options=[*without_torch, *the_others])
        for name, low in in_part.items():
            newer = rf"\1 ; python_full_version >= '{low}' \\"
            extras = re.sub(rf"^({name}==\S+) \\$", newer, extras, flags=re.MULTILINE)
        return {
            "constraints.txt": Path(all_pins).read_text(),
            "build.txt": compile_requirements(file("build.in", "hatchling\ncyclonedx-bom\n"), options=hashed),
            "torch.txt": compile_requirements(file("torch.in", "torch\n"), options=hashed),
            "runtime.txt": runtime,
            "extras.txt": extras,
        }


def resolve_own_torch(options: list[str]) -> str:
    """A lock of torch and all that it needs, for one Python and this platform, of where ``options`` of uv point to."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "torch.in"
        hashed = ["--constraints", str(CONSTRAINTS), "--generate-hashes", "--no-annotate", "--no-header"]
        # An index of torch's builds has other packages too, in versions of its own.
        hashed += ["--index-strategy", "unsafe-best-match", *options]
        wanted.write_text("torch\n")
        return run_uv(str(wanted), *hashed)


def main() -> None:
    if sys.argv[1:2] == ["own-torch"]:
        print(HEADS["own-torch"] + resolve_own_torch(sys.argv[2:]), end="")
        return
    versions = [one for one in sys.argv[1:] if one.startswith("torch==")] or [pinned("torch")]
    written = resolve(versions[-1], [one for one in sys.argv[1:] if not one.startswith("torch==")])
    LOCKS.mkdir(exist_ok=True)
    for name, text in written.items():
        path = CONSTRAINTS if name == CONSTRAINTS.name else LOCKS / name
        path.write_text(HEADS[name] + WRITTEN + text)


if __name__ == "__main__":
    main()
