"""Secrets stay out of what is printed and written: every text that leaves passes through here.

Taken out are users, passwords and queries of URLs, headers and options that carry a secret, tokens
of well-known shapes, and the values of environment variables that are called a token or a key.
"""

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

GONE = "***"
SECRET = r"(?:token|secret|password|passwd|api[_-]?key|access[_-]?key(?:[_-]id)?|credentials?)"
VALUE = r"[^\s'\"\\&]+"
SHORTEST = 8  # shorter values of the environment are words that stand in every text

# Bounded, so that no text, however it was made, takes longer than its length deserves.
PATTERNS = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"(://)[^\s/?#'\"\\]{1,300}@", rf"\1{GONE}@"),
        (r"(\w://[^\s?#'\"\\]{0,1000})[?#][^\s'\"\\]*", rf"\1?{GONE}"),
        (
            rf"\b((?:proxy-)?authorization|(?:set-)?cookie|[\w-]{{0,64}}-{SECRET}|x-auth)"
            r"(\s*:\s*)(?:[^\r\n'\"\\]|\\ )+",
            rf"\1\2{GONE}",
        ),
        (rf"\b(bearer\s+){VALUE}", rf"\1{GONE}"),
        (rf"({SECRET}|signature|\bsig)(\s?=\s?['\"]?){VALUE}", rf"\1\2{GONE}"),
        (rf"(\s--[\w-]{{0,64}}{SECRET}[\s=]+['\"]?){VALUE}", rf"\1{GONE}"),
        (r"(\s(?:-u|--user|--proxy-user)[\s=]*['\"]?)[^\s'\"\\:]{1,300}:[^\s'\"\\]*", rf"\1{GONE}"),
        (r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}", GONE),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", GONE),
    )
]
SECRET_NAME = re.compile(rf"(?:^|_){SECRET}\Z|_KEY\Z", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text without what may be secret in it."""
    for value in secrets_of(os.environ):
        text = text.replace(value, GONE)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted_values(document: Any) -> Any:
    """The same for every text in what becomes JSON or YAML."""
    if isinstance(document, str):
        return redacted(document)
    if isinstance(document, PurePath):
        return redacted(str(document))
    if isinstance(document, Mapping):
        return {redacted_values(key): redacted_values(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [redacted_values(value) for value in document]
    return document


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """The longest first: one may be a part of another."""
    found = {
        value
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST
    }
    return sorted(found, key=len, reverse=True)
