"""Files of known type that are on the machine, as the token sequences that magika feeds its model."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np

from .dataset import Array, Arrays, DataError, DataSet

# From the model's config.min.json: 1024 tokens of the file's head, 1024 of its tail, 256 pads.
_PART, _BLOCK, _PADDING = 1024, 4096, 256
_MIN_SIZE = 64

# The model's `target_labels_space`; the position of a name is its class.
_LABEL_NAMES = (
    "3gp ace ai aidl apk applebplist appleplist asm asp autohotkey autoit awk batch bazel bib bmp bzip c "
    "cab cat chm clojure cmake cobol coff coffeescript cpp crt crx cs csproj css csv dart deb dex dicom "
    "diff dm dmg doc dockerfile docx dsstore dwg dxf elf elixir emf eml epub erb erlang flac flv fortran "
    "gemfile gemspec gif gitattributes gitmodules go gradle groovy gzip h5 handlebars haskell hcl hlp "
    "htaccess html icns ico ics ignorefile ini internetshortcut ipynb iso jar java javabytecode "
    "javascript jinja jp2 jpeg json jsonl julia kotlin latex lha lisp lnk lua m3u m4 macho makefile "
    "markdown matlab mht midi mkv mp3 mp4 mscompress msi mum npy npz nupkg objectivec ocaml odp ods odt "
    "ogg one onnx otf outlook parquet pascal pcap pdb pdf pebin pem perl php pickle png po postscript "
    "powershell ppt pptx prolog proteindb proto psd python pythonbytecode pytorch qt r randombytes "
    "randomtxt rar rdf rpm rst rtf ruby rust scala scss sevenzip sgml shell smali snap solidity sql "
    "sqlite squashfs srt stlbinary stltext sum svg swf swift tar tcl textproto tga thumbsdb tiff toml "
    "torrent tsv ttf twig txt typescript vba vcxproj verilog vhdl vtt vue wasm wav webm webp winregistry "
    "wmf woff woff2 xar xls xlsb xlsx xml xpi xz yaml yara zig zip zlibstream"
)
LABELS = _LABEL_NAMES.split()

# Suffixes whose content is certain: not `.h` (C or C++), `.crt` and `.pem` (each other's content).
SUFFIXES = {
    ".py": "python",
    ".c": "c",
    ".cpp": "cpp",
    ".js": "javascript",
    ".css": "css",
    ".html": "html",
    ".xml": "xml",
    ".svg": "svg",
    ".json": "json",
    ".md": "markdown",
    ".rst": "rst",
    ".sh": "shell",
    ".so": "elf",
    ".png": "png",
    ".jpg": "jpeg",
    ".gif": "gif",
    ".ttf": "ttf",
    ".npy": "npy",
    ".gz": "gzip",
    ".zip": "zip",
    ".csv": "csv",
    ".wav": "wav",
    ".pdf": "pdf",
    ".pl": "perl",
    ".pm": "perl",
    ".sql": "sql",
    ".tcl": "tcl",
    ".f90": "fortran",
    ".toml": "toml",
    ".ini": "ini",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".txt": "txt",
    ".cmake": "cmake",
    ".m4": "m4",
    ".exe": "pebin",
    ".jar": "jar",
    ".onnx": "onnx",
    ".awk": "awk",
    ".tex": "latex",
    ".lisp": "lisp",
    ".el": "lisp",
    ".diff": "diff",
    ".patch": "diff",
    ".ps": "postscript",
}
_PER_CLASS = 10
_CALIBRATION, _EVALUATION = 64, 200


def features(content: bytes) -> Array:
    """Head and tail tokens as magika 1.0 takes them: stripped blocks, padded on the inner side."""
    head = content[:_BLOCK].lstrip()[:_PART]
    tail = content[-_BLOCK:].rstrip()[-_PART:]
    tokens = np.full(2 * _PART, _PADDING, dtype=np.int32)
    tokens[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    tokens[2 * _PART - len(tail) :] = np.frombuffer(tail, dtype=np.uint8)
    return tokens


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    names = [paths["stdlib"], paths["purelib"], "/usr/include", "/usr/share"]
    return [Path(name) for name in names if Path(name).is_dir()]


def find_files() -> dict[str, list[Path]]:
    """At most `_PER_CLASS` distinct files a class, spread over the folders that hold them."""
    found: dict[str, dict[str, Path]] = {}
    for root in _roots():
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(names):
                label = SUFFIXES.get(Path(name).suffix)
                path = Path(folder, name)
                if label and not path.is_symlink():
                    # Sorting by the digest of the name picks widely without depending on the walk.
                    key = hashlib.sha256(f"{path.parent.name}/{name}".encode()).hexdigest()
                    found.setdefault(label, {}).setdefault(key, path)
    return {label: [files[key] for key in sorted(files)] for label, files in sorted(found.items())}


def _samples() -> list[tuple[Array, int]]:
    seen: set[bytes] = set()
    by_class: dict[str, list[tuple[Array, int]]] = {}
    for label, paths in find_files().items():
        rows = by_class.setdefault(label, [])
        for path in paths:
            if len(rows) == _PER_CLASS:
                break
            try:
                content = path.read_bytes()
            except OSError:
                continue
            digest = hashlib.sha256(content).digest()
            if len(content) >= _MIN_SIZE and digest not in seen:
                seen.add(digest)
                rows.append((features(content), LABELS.index(label)))
    # Round robin, so that a cut at any place has all classes alike.
    return [rows[i] for i in range(_PER_CLASS) for rows in by_class.values() if i < len(rows)]


def _stack(samples: list[tuple[Array, int]]) -> Arrays:
    return {
        "bytes": np.stack([tokens for tokens, _ in samples]),
        "label": np.array([label for _, label in samples], dtype=np.int64),
    }


def build(model_path: Path) -> DataSet:
    """64 calibration and 200 evaluation files."""
    samples = _samples()
    if len(samples) < _CALIBRATION + _EVALUATION:
        raise DataError(f"only {len(samples)} files of known type here, {_CALIBRATION + _EVALUATION} needed")
    evaluation = samples[_CALIBRATION : _CALIBRATION + _EVALUATION]
    return DataSet(_stack(samples[:_CALIBRATION]), _stack(evaluation))
