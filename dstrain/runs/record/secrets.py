"""Leaves out of a diff what looks like a secret: by the names of files, and by what stands in a line."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

LEFT_OUT = b"# 1 line left out: looks like a secret"
FILE_LEFT_OUT = b": left out: a file of this name holds secrets"

_FILES = (
    *(
        ".env",
        ".env.*",
        "*.env",
        ".envrc",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.jks",
        "*.keystore",
        "*.kdbx",
    ),
    *("*.ppk", "*.ovpn", "*.tfstate", "*.tfvars", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *(
        "credentials",
        "credentials.*",
        "*_credentials*",
        "*-credentials*",
        "client_secret*",
        "service*account*.json",
    ),
    *(".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", ".htpasswd", ".git-credentials", ".dockercfg"),
    *("secrets", "secrets.*", "*.secret", "*.secrets", "kubeconfig", "kaggle.json", "token.txt"),
)
_FOLDERS = (".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure", "gcloud")

# Each repetition has an end: a line may be as long as a file.
_TOKENS = re.compile(
    rb"""
      \b hf_[A-Za-z0-9]{20}                                 # Hugging Face
    | \b (?:sk|pk|rk)[-_][A-Za-z0-9_-]{16}                  # OpenAI, Anthropic, Stripe
    | \b gh[pousr]_[A-Za-z0-9]{20} | \b github_pat_\w{20} | \b glpat-[\w-]{16}
    | \b (?:AKIA|ASIA)[A-Z0-9]{12}                          # AWS
    | \b AIza[\w-]{30}                                      # Google
    | \b xox[abeprs]-[\w-]{8}                               # Slack
    | \b npm_[A-Za-z0-9]{20} | \b pypi-[\w-]{16}
    | \b eyJ[\w-]{8,400}\.[\w-]{8}                        # JSON web token
    | \b [a-z][a-z0-9+.-]{0,20}://[^\s/:@]{0,100}:[^\s/@]{1,200}@  # a password in an address
    | \b (?:Bearer|Basic)\s{1,4}[A-Za-z0-9+/_.=-]{12}
    """,
    re.VERBOSE,
)
_VALUE = (
    rb"\d{0,2}[\"']?\s{0,8}(?::=|[:=])\s{0,8}"
    rb"(?P<value>[\"'][^\"']{4,100}|[^\s\"',;(){}\[\]]{4,100})(?P<after>.?)"
)
_PASSWORD = re.compile(rb"(?:password|passwd|passphrase)" + _VALUE, re.IGNORECASE)
_KEY = re.compile(rb"(?:secret|token|key|authorization|credentials?)" + _VALUE, re.IGNORECASE)
# What is given is a type, nothing, something to be filled in, or what another name holds.
_NO_PASSWORD = re.compile(
    rb"none|null|true|false|string|bytes|optional|<[^>]*>|\$\{?\w+\}?|\*+|\w+(?:\.\w+)+",
    re.IGNORECASE,
)
_KEY_VALUE = re.compile(rb"[\"']?(?=[^\s]*[0-9])(?=[^\s]*[A-Za-z])[^\s<>]{8,}")
_RANDOM = re.compile(rb"(?<![\w+/=-])[A-Za-z0-9+/_-]{40,}={0,2}(?![\w+/=-])")
_DIGEST = re.compile(rb"(?:[0-9a-f]{40}|[0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})")
_BEGIN, _END = (
    re.compile(rb"-----BEGIN [A-Z0-9 ]*(?:PRIVATE KEY|CERTIFICATE)"),
    re.compile(rb"-----END [A-Z0-9 ]*-----"),
)
_HEADER = re.compile(rb'diff --git "?a/.*?"? "?b/(?P<name>.*?)"?$')


def without_secrets(diff: bytes) -> tuple[bytes, int]:
    """A diff of git in which each line that looks like a secret is replaced by `LEFT_OUT`, and a file whose name says
    that it holds secrets by one line; and how many of these there are. A line keeps its first sign, so that
    ``git apply`` takes the rest.

    Of a binary file only the name is looked at.
    """
    lines = list(_lines(diff))
    return b"".join(line for line, _ in lines), sum(out for _, out in lines)


def names_secrets(path: str) -> bool:
    """Whether a file of this name usually holds secrets."""
    *folders, name = path.lower().split("/")
    return any(folder in _FOLDERS for folder in folders) or any(fnmatchcase(name, each) for each in _FILES)


def looks_secret(line: bytes) -> bool:
    """Whether a line of text holds a token, a password or a long random text."""
    return (
        _TOKENS.search(line) is not None
        or any(_is_given(match) for match in _PASSWORD.finditer(line))
        or any(_is_given(match) and _KEY_VALUE.match(match["value"]) for match in _KEY.finditer(line))
        or any(
            not _DIGEST.fullmatch(match.group()) and _is_random(match.group())
            for match in _RANDOM.finditer(line)
        )
    )


def _is_given(match: re.Match[bytes]) -> bool:
    """Whether what is given is a value, and no part of a piece of code."""
    value, after = match["value"], match["after"]
    whole = value[:1] in b"\"'" or not after.strip() or len(value) == 100
    return whole and not _NO_PASSWORD.fullmatch(value.strip(b"\"'"))


def _is_random(text: bytes) -> bool:
    """Capitals, small letters and digits in turn, as in no name and no path."""
    kinds = [re.search(kind, text) for kind in (rb"[A-Z]", rb"[a-z]", rb"[0-9]")]
    return all(kinds) and text.count(b"/") < 4 and text.count(b"_") < 4


def _lines(diff: bytes) -> Iterator[tuple[bytes, bool]]:
    """Each line with its end, and whether it stands for something that was left out."""
    secret_file = in_text = in_key = False
    for line in io.BytesIO(diff):
        if header := _HEADER.match(line.rstrip(b"\n")):
            secret_file = names_secrets(header["name"].decode(errors="replace"))
            in_text = in_key = False
            if secret_file:
                yield b"# " + header["name"] + FILE_LEFT_OUT + b"\n", True
        elif secret_file:
            continue
        elif line.startswith(b"@@"):
            in_text, in_key = True, False
            if looks_secret(line):  # git repeats a line of the file behind the second @@
                line = line[: line.index(b"@@", 2) + 2] + b"\n"
        elif in_text and line[:1] in (b"+", b"-", b" "):
            in_key = in_key or _BEGIN.search(line) is not None
            if in_key or looks_secret(line[1:]):
                in_key = in_key and _END.search(line) is None
                yield line[:1] + LEFT_OUT + b"\n", True
                continue
        if not secret_file:
            yield line, False
