"""The embedded llama-server: ``python -m llamaslot.llama.managed.embedded -m model.gguf --port 8080 …``.

The wheel ``xllamacpp`` contains the server of llama.cpp as a library. This module runs it in a process of its own, so
that it can be killed and restarted, and accepts those flags of ``llama-server`` that llamaslot uses. The process ends
at the end of its standard input, on SIGTERM or SIGINT, and with its parent: it never outlives the process that started
it.

Exit codes: 0 after one of these (a signal during loading kills it); 1 if the server could not start, and the last line
on standard error says why; 2 for wrong flags.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from llamaslot.errors import how_to_add

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Seconds before our last line: llama.cpp logs in a thread, whose lines must come first.
LOG_LAG_S = 0.1


def die_with_parent() -> None:
    """Ask the kernel to send SIGKILL to this process when the thread that started it ends. Does nothing on other
    systems than Linux. The request survives an execve of an ordinary program, but not a fork (prctl(2)).
    """
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    except (OSError, AttributeError):
        return


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, with flags named as in llama-server."""
    p = argparse.ArgumentParser(
        prog="python -m llamaslot.llama.managed.embedded",
        description="llama.cpp's server out of the xllamacpp wheel; ends with its standard input.",
        allow_abbrev=False,
    )
    p.add_argument("-m", "--model", type=Path, required=True, metavar="FILE", help="the GGUF")
    p.add_argument("--alias", metavar="NAME", help="the model's name in the API")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8080, help="0: any free one, named in the log")
    p.add_argument(
        "--api-key", default=os.environ.get("LLAMA_API_KEY"), help="also LLAMA_API_KEY in the environment"
    )
    p.add_argument("-np", "--parallel", type=int, default=1, metavar="N", help="slots")
    p.add_argument("-c", "--ctx-size", type=int, default=0, metavar="N", help="tokens, all slots together")
    p.add_argument("-b", "--batch-size", type=int, default=2048, metavar="N")
    p.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N")
    p.add_argument("-t", "--threads", type=int, default=_default_threads(), metavar="N")
    p.add_argument(
        "-md", "--model-draft", type=Path, metavar="FILE", help="draft model for speculative decoding"
    )
    p.add_argument(
        "--lora", type=Path, action="append", default=[], metavar="FILE",
        help="LoRA adapter, as a GGUF; again for more",
    )  # fmt: skip
    p.add_argument(
        "-n", "--predict", type=int, default=-1, metavar="N", help="tokens of an answer, -1: until it ends"
    )
    p.add_argument("-mm", "--mmproj", type=Path, metavar="FILE", help="projector, for images")
    p.add_argument("--slot-save-path", type=Path, metavar="DIR")
    p.add_argument("-sps", "--slot-prompt-similarity", type=float, default=0.1, metavar="RATIO")
    p.add_argument("--cache-ram", type=int, default=8192, metavar="MIB", help="RAM prompt cache, 0: none")
    flag = argparse.BooleanOptionalAction
    p.add_argument("--cache-idle-slots", action=flag, default=True)
    p.add_argument("--kv-unified", action=flag, default=False)
    p.add_argument("--swa-full", action="store_true")
    p.add_argument("--context-shift", action=flag, default=False)
    p.add_argument("--ctx-checkpoints", type=int, default=32, metavar="N")
    p.add_argument(
        "--sleep-idle-seconds",
        type=int,
        default=-1,
        metavar="N",
        help="unload the model after that, -1: never",
    )
    p.add_argument("--metrics", action="store_true")
    p.add_argument("--slots", action=flag, default=True, help="GET /slots")
    p.add_argument("--props", action="store_true", help="POST /props")
    p.add_argument("--jinja", action=flag, default=True)
    p.add_argument("--chat-template-file", type=Path, metavar="FILE")
    p.add_argument("--reasoning-format", choices=("none", "auto", "deepseek", "deepseek-legacy"))
    p.add_argument("--warmup", action=flag, default=False)
    p.add_argument(
        "--log-file", type=Path, metavar="FILE", help="append everything there instead of standard error"
    )
    p.add_argument(
        "--umask", type=lambda text: int(text, 8), default=0o077, metavar="OCTAL", help="of slot files; 077"
    )
    return p


def _default_threads() -> int:
    """The default number of threads: all cores but one, which llamaslot and the clients need. With one thread too many,
    prefill was 4 times slower.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Serve until the end of standard input or a signal, then exit. Never returns."""
    die_with_parent()
    flags = parser().parse_args(argv)
    os.umask(flags.umask)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if flags.log_file:
        _redirect(flags.log_file)
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        _fail(f"the embedded engine is not installed ({error}): {how_to_add('xllamacpp')}")
    except ImportError as error:  # an empty Debian has no libgomp
        _fail(f"the embedded engine lacks a library of the system ({error}): apt install libgomp1")
    for file in filter(
        None, (flags.model, flags.model_draft, flags.mmproj, flags.chat_template_file, *flags.lora)
    ):
        if not os.access(file, os.R_OK):
            _fail(f"cannot load model {file}: " + ("not readable" if file.exists() else "no such file"))
    try:
        # This loads the model and holds the GIL. Until it returns, no Python thread runs, and signals have their
        # default action.
        server = xllamacpp.Server(_params(xllamacpp, flags))
    except RuntimeError as error:
        _fail(_why(flags, error))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    _until_end_of_input(server)
    os._exit(0)  # at once: an orderly stop would wait for the ends of all running answers


def _params(xllamacpp: Any, flags: argparse.Namespace) -> Any:
    """``flags`` as the parameters of llama.cpp's ``common_params``."""
    p = xllamacpp.CommonParams()
    p.model.path = str(flags.model)
    if flags.alias:
        p.model_alias = {flags.alias}
    p.hostnames = [flags.host]
    p.port = flags.port
    if flags.api_key:
        p.api_keys = [flags.api_key]
    p.n_parallel, p.n_ctx = flags.parallel, flags.ctx_size
    p.n_predict = flags.predict
    if flags.mmproj:
        p.mmproj.path, p.mmproj_use_gpu = str(flags.mmproj), False
    p.n_batch, p.n_ubatch = flags.batch_size, min(flags.ubatch_size, flags.batch_size)
    threads = [p.cpuparams, p.cpuparams_batch]
    threads += [p.speculative.draft.cpuparams, p.speculative.draft.cpuparams_batch]
    for cpu in threads:
        cpu.n_threads = flags.threads
    if flags.model_draft:
        p.speculative.draft.mparams.path = str(flags.model_draft)
        p.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    if flags.lora:
        p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0) for file in flags.lora]
    if flags.slot_save_path:
        p.slot_save_path = f"{flags.slot_save_path}/"  # the library appends file names without a slash
    p.slot_prompt_similarity = flags.slot_prompt_similarity
    p.cache_ram_mib, p.cache_idle_slots = flags.cache_ram, flags.cache_idle_slots
    p.kv_unified, p.swa_full, p.ctx_shift = flags.kv_unified, flags.swa_full, flags.context_shift
    p.n_ctx_checkpoints = flags.ctx_checkpoints
    p.endpoint_metrics, p.endpoint_slots, p.endpoint_props = flags.metrics, flags.slots, flags.props
    p.sleep_idle_seconds = flags.sleep_idle_seconds
    p.use_jinja = flags.jinja
    if flags.chat_template_file:
        p.chat_template = flags.chat_template_file.read_text()
    if flags.reasoning_format:
        name = "COMMON_REASONING_FORMAT_" + flags.reasoning_format.replace("-", "_").upper()
        p.reasoning_format = getattr(xllamacpp.common_reasoning_format, name)
    p.warmup = flags.warmup
    # Else llama.cpp loads the model once more to measure it. A model that does not fit fails anyway.
    p.fit_params = False
    return p


def _redirect(log_file: Path) -> None:
    """Redirect the descriptors of standard output and error to ``log_file``: llama.cpp does not use ``sys.stderr``."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _why(flags: argparse.Namespace, error: Exception) -> str:
    """A line that says why the server could not start. llama.cpp has one message for all causes; of these only a port
    that another program uses can be found out afterwards.
    """
    if flags.port:
        try:
            with socket.create_server((flags.host, flags.port)):
                pass
        except OSError as taken:
            return f"cannot listen on {flags.host}:{flags.port}: {os.strerror(taken.errno) if taken.errno else taken}"
    return f"cannot load model {flags.model}: {error} The lines above say why."


def _until_end_of_input(server: Any) -> None:
    """Wait for the end of standard input. The parameter ``server`` keeps a reference: without one, the server stops."""
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        return  # this process has no standard input, which counts as its end


def _fail(message: str) -> NoReturn:
    """Write ``message`` as the last line on standard error, and exit with 1, without an interpreter shutdown, because
    threads of llama.cpp may still run.
    """
    last = os.dup(2)
    time.sleep(LOG_LAG_S)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.write(last, f"llamaslot embedded: {message}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    main()
