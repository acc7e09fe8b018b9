"""Make the virtual environment that `make` uses: `python tools/setup_venv.py .venv`.

It needs Python alone, and it parses under any Python from 3.6 on, so that an unsuitable one gets a sentence and no
traceback. torch goes first and by its exact version: a bare "torch" would pull the newest one and gigabytes of CUDA
libraries. PyTorch's own index has the CPU builds; where it does not answer, pip's configured sources serve as they are.

A second onnxruntime, the oldest that pyproject.toml allows, goes into a folder of its own, which nothing imports unless
it is asked to: tests count the integer kernels that both versions build.
"""

import http.client
import importlib.util
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_ONNXRUNTIME = "1.23.2"  # the last release of the lower bound in pyproject.toml; a test compares the two
OLDEST_FOLDER = "oldest"  # within the environment
OLDEST, NEWEST = (3, 10), (3, 14)
PROBE_SECONDS = 5
RUNS = f"import sys; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"


def stop(sentence: str) -> None:
    sys.exit(f"setup: {sentence}")


def check_python() -> None:
    """Refuse a Python that is too old, too new, or lacks the modules that make environments."""
    this = sys.version_info
    if not OLDEST <= this[:2] <= NEWEST:
        stop(
            f"Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} is needed, but {sys.executable} is Python "
            f"{this[0]}.{this[1]}. Name a suitable one: make PYTHON=python3.11 ..."
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            stop(
                f"{sys.executable} has no module {module}. Install it (Debian, Ubuntu: "
                f"apt install python{this[0]}.{this[1]}-venv) or name another Python: make PYTHON=python3.11 ..."
            )


def cpu_index_answers() -> bool:
    """Whether PyTorch's index can be reached. One short question: pip alone would retry a dead index for minutes."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=PROBE_SECONDS):
            return True
    except (
        OSError,
        ValueError,
        http.client.HTTPException,
    ):  # no network, no such host, refused, a proxy's page, a bad certificate
        return False


def make_environment(folder: Path) -> Path:
    """Create the environment unless there is one that works; returns its Python."""
    python = folder / "bin" / "python"
    works = python.exists() and subprocess.call([str(python), "-c", RUNS]) == 0
    if not works:
        print(f"setup: creating {folder} with Python {sys.version.split()[0]}", flush=True)
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", str(folder)])
    return python


def install(python: Path) -> None:
    # Modules are compiled when they are first imported: most of 20,000 files never are, and all take half a minute.
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    if not sys.stdout.isatty():
        pip.append("--quiet")  # a log needs no progress bars
    index = []
    if cpu_index_answers():
        index = ["--extra-index-url", CPU_INDEX]
    else:
        print(f"setup: {CPU_INDEX} does not answer; taking {TORCH} from pip's configured sources", flush=True)
    print(f"setup: installing {TORCH} (about 200 MB as the CPU build)", flush=True)
    subprocess.check_call([*pip, TORCH, *index])
    print("setup: installing mezzotint and what it needs", flush=True)
    root = Path(__file__).resolve().parent.parent
    subprocess.check_call([*pip, "--editable", f"{root}[torch,dev]"])


def has_oldest(python: Path, folder: Path) -> bool:
    """Whether the oldest supported onnxruntime lies there and can be imported."""
    code = f"import onnxruntime, sys; sys.exit(onnxruntime.__version__ != '{OLDEST_ONNXRUNTIME}')"
    environment = dict(os.environ, PYTHONPATH=str(folder))
    return subprocess.call([str(python), "-c", code], env=environment, stderr=subprocess.DEVNULL) == 0


def install_oldest(python: Path, folder: Path) -> None:
    """Put the oldest supported onnxruntime beside the installed one, unless it is there already."""
    if has_oldest(python, folder):
        return
    print(f"setup: installing onnxruntime {OLDEST_ONNXRUNTIME} into {folder}, for the tests", flush=True)
    # What it needs is installed already, for the newer one; --upgrade replaces what an interrupted run left.
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-compile"]
    command += ["--no-deps", "--upgrade", "--target", str(folder), f"onnxruntime=={OLDEST_ONNXRUNTIME}"]
    subprocess.check_call(command)
    if not has_oldest(python, folder):
        stop(f"onnxruntime {OLDEST_ONNXRUNTIME} in {folder} cannot be imported")


def main() -> None:
    if len(sys.argv) != 2:
        stop("usage: python tools/setup_venv.py FOLDER")
    check_python()
    try:
        python = make_environment(Path(sys.argv[1]))
        install(python)
        install_oldest(python, Path(sys.argv[1]) / OLDEST_FOLDER)
    except subprocess.CalledProcessError as error:
        stop(f"this command failed (exit code {error.returncode}): {' '.join(map(str, error.cmd))}")


if __name__ == "__main__":
    main()
