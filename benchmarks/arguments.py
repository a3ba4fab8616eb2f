"""What command lines of the benchmarks have in common. Wrong words are told before anything runs."""

import argparse
import math
from collections.abc import Callable, Container
from pathlib import Path

import torch


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def count(text: str) -> int:
    """1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return value


def names_among(known: Container[str]) -> Callable[[str], tuple[str, ...]]:
    """A,B,C, all of them known."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no such peer: {', '.join(sorted(unknown))}")
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError("a peer is named twice")
        return names

    return parse


def device(text: str) -> torch.device:
    """A CUDA device or the CPU; whether it is there is another question."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"torch knows no device {text!r}") from error
    if found.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"snapshots are taken from cuda or cpu, not from {found.type}")
    return found


def multiple(of: int) -> Callable[[str], int]:
    """A whole number that it divides."""

    def parse(text: str) -> int:
        value = count(text)
        if value % of:
            raise argparse.ArgumentTypeError(f"{text!r} is no multiple of {of}")
        return value

    return parse


def folder(text: str) -> Path:
    """A folder, made if need be."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no folder: {error}") from error
    return path


def file_to_append_to(text: str) -> Path:
    """An absolute path, in a folder that exists: figures are written when everything has run."""
    path = Path(text).absolute()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; give a file")
    return path
