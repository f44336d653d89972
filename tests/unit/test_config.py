"""config.yaml: what it becomes, and how its faults are told."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from llamaslot.config.faults import keys_of
from llamaslot.config.load import Config
from llamaslot.config.sections import default_meta_dir
from llamaslot.errors import ConfigError
from llamaslot.llama.routes import Gate

REPOSITORY = Path(__file__).parents[2]
BACKEND = "backends: [{url: 'http://127.0.0.1:8080'}]\n"

Load = Callable[[str], Config]
Faults = Callable[[str], list[str]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a text to config.yaml and load it."""

    def write_and_load(text: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return Config.load(path)

    return write_and_load


@pytest.fixture
def faults(load: Load) -> Faults:
    """The faults of a text that has some."""

    def faults_of(text: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text)
        return caught.value.faults

    return faults_of


PREWARM = "backends: [{url: 'http://127.0.0.1:8080', slot_save_path: kv}]\nprewarm: [agent.json]\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "agent.json cannot be read: No such file or directory"),
        ("{", "agent.json is not JSON: "),
        ("[]", "agent.json should hold a chat body: an object"),
        ("{}", '"messages" is missing or empty'),
        ('{"messages": []}', '"messages" is missing or empty'),
        ('{"messages": [{"content": "Be kind."}]}', 'messages[0] should be an object with "role"'),
    ],
)
def test_prewarm_wants_chat_bodies(tmp_path: Path, faults: Faults, content: str | None, said: str) -> None:
    """What is wrong with a file is said with its place in the list."""
    if content is not None:
        (tmp_path / "agent.json").write_text(content)
    (fault,) = faults(PREWARM)
    assert fault.startswith("prewarm[0]: ")
    assert said in fault


def test_prewarm_needs_a_place_to_keep_it(tmp_path: Path, load: Load, faults: Faults) -> None:
    """A managed server has one of its own."""
    (tmp_path / "agent.json").write_text('{"messages": [{"role": "system", "content": "Be kind."}]}')
    assert load(PREWARM).prewarm == (tmp_path / "agent.json",)
    assert faults(PREWARM.replace(", slot_save_path: kv", "")) == [
        "prewarm: needs backends[0].slot_save_path: what is computed ahead is kept there"
    ]


# --- what a good file becomes


def test_only_a_backend_is_needed(load: Load) -> None:
    """Everything else has the default that the documents promise."""
    config = load(BACKEND)
    assert config.backend.url == "http://127.0.0.1:8080"
    assert (config.listen.host, config.listen.port, config.listen.max_body) == (
        "127.0.0.1",
        8081,
        64 * 1024**2,
    )
    assert (config.store.quota, config.store.idle_save_s) == (20 * 1024**3, 2.0)
    assert (config.store.max_files, config.store.min_free) == (10_000, 1024**3)
    assert (config.routing.similarity_min, config.routing.small_prompt_tokens) == (0.85, 1024)
    assert config.prefill.chunk_threshold_s is None
    assert (config.queue.max_waiting, config.queue.max_wait_s) == (256, 600.0)
    assert (config.stream.keepalive_s, config.stream.comments) == (10.0, True)
    assert config.passthrough.allow == ()
    assert (config.listen.tls, config.listen.cors) == (None, ())
    assert (config.auth.keys_file, config.auth.allow_anonymous) == (None, False)
    assert (config.auth.resolve_admin_key(), config.log.prompts) == (None, False)
    assert (config.shutdown.save_s, config.shutdown.drain_s) == (60.0, 30.0)
    assert config.log.level == "info"


def test_a_section_without_keys_is_its_defaults(load: Load) -> None:
    """Commenting out every key of a section leaves None in YAML: no fault."""
    assert load(BACKEND + "queue:\n  # max_waiting: 3\nlog:\n").queue.max_waiting == 256


def test_a_config_can_not_be_changed(load: Load) -> None:
    """Settings are read once; nobody changes them under another's feet."""
    with pytest.raises(ValueError, match="frozen"):
        load(BACKEND).listen.port = 1


def test_relative_paths_start_at_the_file(load: Load, tmp_path: Path) -> None:
    """The working directory plays no part: a service has none worth the name."""
    config = load(BACKEND.replace("}]", ", slot_save_path: ../kv}]") + "store: {meta_dir: meta}")
    assert config.backend.slot_save_path == tmp_path / "../kv"
    assert config.store.meta_dir == tmp_path / "meta"


def test_a_tilde_is_the_home_directory(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell."""
    monkeypatch.setenv("HOME", "/home/ada")
    assert load(BACKEND + "store: {meta_dir: ~/slots}").store.meta_dir == Path("/home/ada/slots")


def test_meta_dir_follows_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit with StateDirectory= needs no store.meta_dir."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/llamaslot:/var/lib/other")
    assert default_meta_dir() == Path("/var/lib/llamaslot")


def test_meta_dir_of_root_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root has a place for services, others have the XDG state directory."""
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/ada/state")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_meta_dir() == Path("/var/lib/llamaslot")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert default_meta_dir() == Path("/home/ada/state/llamaslot")


def test_a_managed_server_saves_beside_the_index(load: Load, tmp_path: Path) -> None:
    """Its slot_save_path need not be given."""
    config = load("backends: [{managed: {model: /m.gguf, command: sh}}]\nstore: {meta_dir: meta}")
    assert config.backend.slot_save_path == tmp_path / "meta/kv"


def test_a_command_is_a_line_or_a_list(load: Load, tmp_path: Path) -> None:
    """Both forms mean the same, and numbers among the words are words; a relative model starts at the file."""
    line = load("backends: [{managed: {model: m.gguf, command: \"nice llama-server -x 'a b'\", args: -t 4}}]")
    words = load(
        "backends: [{managed: {model: m.gguf, command: [nice, llama-server, -x, a b], args: [-t, 4]}}]"
    )
    assert line.backend == words.backend
    assert line.backend.managed is not None
    assert line.backend.managed.command == ("nice", "llama-server", "-x", "a b")
    assert line.backend.managed.args == ("-t", "4")
    assert line.backend.managed.model == str(tmp_path / "m.gguf")


def test_the_key_can_come_from_a_file(load: Load, tmp_path: Path) -> None:
    """The line's end is no part of it."""
    (tmp_path / "key").write_text("s3cret\n")
    assert load(BACKEND.replace("}]", ", api_key_file: key}]")).backend.resolve_api_key() == "s3cret"


def test_the_key_is_not_shown(load: Load) -> None:
    """A configuration may be logged; its secret may not."""
    backend = load(BACKEND.replace("}]", ", api_key: s3cret}]")).backend
    assert backend.resolve_api_key() == "s3cret"
    assert "s3cret" not in repr(backend)


def test_a_key_file_that_has_gone_is_a_config_error(load: Load, tmp_path: Path) -> None:
    """It is read anew at each call, so that a key can be exchanged."""
    (tmp_path / "key").write_text("s3cret")
    backend = load(BACKEND.replace("}]", ", api_key_file: key}]")).backend
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        backend.resolve_api_key()


def test_a_url_ends_without_a_slash(load: Load) -> None:
    """Routes are appended to it."""
    assert load("backends: [{url: 'https://box:8080/llama/'}]").backend.url == "https://box:8080/llama"


# --- how faults are told


def test_all_faults_at_once(faults: Faults) -> None:
    """What is wrong by itself, what is wrong together and what is unknown: one list, each with its path."""
    found = faults("""
listen: {prot: 1, port: 99999}
backends:
  - url: 127.0.0.1:8080
    managed: {model: /m.gguf, command: sh, slots: 0}
    api_key_file: nowhere
  - {}
queue: {max_wait_s: 10s}
quota: 3GiB
""")
    assert [fault.split(": ")[0] for fault in found] == [
        "listen.port",
        "listen.prot",
        "backends[0].url",
        "backends[0].api_key_file",
        "backends[0].managed.slots",
        "queue.max_wait_s",
        "quota",
        "backends[1].name",
        "backends[0].managed",
        "backends[1]",
    ]


def test_the_message_is_a_list(load: Load, tmp_path: Path) -> None:
    """The file, how many, and a line for each."""
    with pytest.raises(ConfigError) as caught:
        load(BACKEND + "listen: {port: 0, host: ''}")
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/config.yaml: 2 faults",
        "  listen.host: should not be empty; not ''",
        "  listen.port: should be at least 1; not 0",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (BACKEND + "lisen: {}", "lisen: unknown key; did you mean listen?"),
        (BACKEND + "quota: 3GiB", "quota: unknown key here; did you mean store.quota?"),
        (BACKEND + "zebra: 1", "zebra: unknown key; known here: listen, backends, models, "),
        (BACKEND + "SLOTS_COUNT: 4", "SLOTS_COUNT: unknown key; now nothing: the number of slots is read"),
        (BACKEND + "listen: {1: 2}", "listen[1]: is not a key that can be used here"),
        (BACKEND + "listen: 8081", "listen: should be a mapping with the keys host, port, max_body"),
        (BACKEND + "listen: {port: 0x1F90A}", "listen.port: should be at most 65535; not 129290"),
        (BACKEND + "listen: {port: on}", "listen.port: should be a number, not on"),
        (BACKEND + "listen: {port: http}", "listen.port: should be a whole number; not 'http'"),
        (BACKEND + "listen: {host: 127}", "listen.host: should be text; put it in quotes; not 127"),
        (BACKEND + "listen: {max_body: 0}", "listen.max_body: should be greater than 0; not 0"),
        (BACKEND + "listen: {max_body: 5 MB/s}", "listen.max_body: should be a size such as 64MiB"),
        (BACKEND + "store: {quota: -5}", "store.quota: should be at least 0; not -5"),
        (BACKEND + "store: {max_files: 0}", "store.max_files: should be greater than 0; not 0"),
        (
            BACKEND + "store: {min_free: plenty}",
            "store.min_free: should be a size such as 64MiB or 200GiB, or a number of bytes; not 'plenty'",
        ),
        (BACKEND + "store: {meta_dir: ''}", "store.meta_dir: should be a path, and is empty"),
        (BACKEND + "store: {meta_dir: 7}", "store.meta_dir: should be a path; not 7"),
        (
            BACKEND + "store: {meta_dir: ~nobody-at-all/x}",
            "store.meta_dir: ~nobody-at-all/x: there is no such home",
        ),
        (BACKEND + "routing: {similarity_min: 0}", "routing.similarity_min: should be greater than 0; not 0"),
        (BACKEND + "routing: {similarity_min: 85}", "routing.similarity_min: should be at most 1; not 85"),
        (
            BACKEND + "queue: {max_wait_s: 10s}",
            "queue.max_wait_s: should be a number of seconds, such as 10; not '10s'",
        ),
        (BACKEND + "queue: {max_wait_s: .inf}", "queue.max_wait_s: should be a number; not inf"),
        (BACKEND + "stream: {comments: maybe}", "stream.comments: should be on or off; not 'maybe'"),
        (BACKEND + "passthrough: {allow: [/tool]}", "passthrough.allow[0]: should be "),
        (BACKEND + "passthrough: {allow: /tools}", "passthrough.allow: should be a list"),
        (
            BACKEND + "log: {level: warn}",
            "log.level: should be 'debug', 'info', 'warning' or 'error'; not 'warn'; did",
        ),
        (
            BACKEND + "listen: {cors: ['https://a.page/']}",
            "listen.cors[0]: should be '*' (any page), or an origin",
        ),
        (BACKEND + "listen: {cors: [a.page]}", "listen.cors[0]: should be '*' (any page), or an origin"),
        (BACKEND + "listen: {cors: '*'}", "listen.cors: should be a list"),
        (BACKEND + "listen: {tls: on}", "listen.tls: should be a mapping with the keys cert, key"),
        (BACKEND + "listen: {tls: {cert: none.pem}}", "listen.tls.key: is missing"),
        (BACKEND + "listen: {tls: {cert: none.pem}}", "listen.tls.cert: /"),
        (BACKEND + "auth: {keys_file: none.json}", "auth.keys_file: /"),
        (BACKEND + "auth: {allow_anonymous: maybe}", "auth.allow_anonymous: should be on or off"),
        (BACKEND + "auth: {admin_key: short}", "auth.admin_key: should be at least 16 letters"),
        (BACKEND + "auth: {admin_key_file: /dev/null}", "auth.admin_key_file: /dev/null should hold the key"),
        (
            BACKEND + "auth: {admin_key: 0123456789abcdef, admin_key_file: k}",
            "auth.admin_key_file: not together with admin_key",
        ),
        ("", "the file: is empty: it needs at least 'backends'"),
        ("- 1", "the file: should be a mapping with the keys listen, backends"),
        ("listen: {}", "backends: is missing"),
        ("backends:", "backends: should be a list"),
        ("backends: {url: 'http://a'}", "backends: should be a list: '- ' begins each backend"),
        (BACKEND + "models: {aliases: [a]}", "models.aliases: should be a mapping: one 'name: value' a line"),
        (
            BACKEND + "store: {quota: 200}",
            "store.quota: should have a unit: 200GiB or 200MiB; 200 alone is bytes",
        ),
        (BACKEND + "store: {quota: '1'}", "store.quota: should have a unit: 1GiB or 1MiB; 1 alone is bytes"),
        (
            BACKEND + "listen: {host: '[::1]'}",
            "listen.host: [::1] is not known: an IPv6 address is written without",
        ),
        (
            BACKEND + "listen: {host: '127.0.0.1:80'}",
            "listen.host: 127.0.0.1:80 is not known: a port goes into",
        ),
        (
            "backends: [{managed: {model: m, command: sh, args: [-fa, on]}}]",
            "backends[0].managed.args[1]: should be text; put it in quotes, else YAML reads it as true",
        ),
        ("backends: []", "backends: is empty"),
        ("backends: [{}]", "backends[0]: needs url (where a llama-server runs) or managed (how to run one)"),
        ("backends: [{url: null}]", "backends[0]: needs url"),
        (
            BACKEND[:-2] + ", {url: 'http://b'}]",
            "backends[1].name: is llama, as that of backends[0]: give each backend a name of its own",
        ),
        (
            "backends: [{name: a, managed: {model: m, command: sh, port: 9000}},"
            " {name: b, managed: {model: n, command: sh, port: 9000}}]",
            "backends[1].managed.port: is 9000, as that of backends[0]; without it a free one is taken",
        ),
        (BACKEND + "managed: {max_loaded: 0}", "managed.max_loaded: should be greater than 0; not 0"),
        (BACKEND + "managed: {idle_unload_s: 0}", "managed.idle_unload_s: should be greater than 0; not 0"),
        (
            "backends: [{url: 'http://b', managed: {model: m, command: sh}}]",
            "backends[0].managed: not together with url",
        ),
        (
            "backends: [{url: 'http://b', api_key: a, api_key_file: /dev/null}]",
            "backends[0].api_key_file: not together",
        ),
        ("backends: [{url: 'http://b', api_key_file: none}]", "backends[0].api_key_file: /"),
        (
            "backends: [{url: 'http://b', api_key_file: /dev/null}]",
            "backends[0].api_key_file: /dev/null should hold",
        ),
        ("backends: [{url: 'http://b', name: 'a/b'}]", "backends[0].name: should be letters, digits"),
        (
            "backends: [{url: 'b:80'}]",
            "backends[0].url: should begin with http:// or https://; did you mean http://b:80?",
        ),
        (
            "backends: [{url: 'ftp://b'}]",
            "backends[0].url: should begin with http:// or https://, not ftp://",
        ),
        ("backends: [{url: 'http://b:99999'}]", "backends[0].url: is not a URL that can be used"),
        ("backends: [{url: 'http://[::1'}]", "backends[0].url: is not a URL that can be used"),
        ("backends: [{url: 'http://:80'}]", "backends[0].url: should name a host and a port"),
        ("backends: [{url: 'http://me:pw@b'}]", "backends[0].url: should be an address only"),
        (
            "backends: [{url: 'http://b/v1/'}]",
            "backends[0].url: should be llama-server's root, without the /v1",
        ),
        ("backends: [{url: 'http://localhost:8081/'}]", "backends[0].url: is llamaslot's own address"),
        *(
            (
                f"backends: [{{name: a, url: '{one}'}}, {{name: b, url: '{other}'}}]",
                f"backends[1].url: is {other}, the same server as that of backends[0]",
            )
            for one, other in [
                ("http://127.0.0.1:8080", "HTTP://LOCALHOST:8080/"),
                ("http://box", "http://Box.:80"),
                ("https://box/a/", "https://box:443/a"),
                ("http://[::1]:8080", "http://[0:0::1]:8080"),
                ("http://0.0.0.0:8080", "http://localhost:8080"),
            ]
        ),
        ("backends: [{managed: {}}]", "backends[0].managed.model: is missing"),
        (
            "backends: [{managed: {model: /no/x.gguf}}]",
            "backends[0].managed.model: there is no such file: /no/x.gguf",
        ),
        (
            "backends: [{managed: {model: m, command: [no-such-server, -x]}}]",
            "backends[0].managed.command: there is no program no-such-server",
        ),
        (
            "backends: [{managed: {model: m, command: sh, port: 8081}}]",
            "backends[0].managed.port: is listen.port too",
        ),
        (
            'backends: [{managed: {model: m, command: "sh \'y"}}]',
            "backends[0].managed: command cannot be split",
        ),
        (
            "backends: [{managed: {model: m, command: [sh], args: [on]}}]",
            "backends[0].managed.args[0]: should be text",
        ),
        (BACKEND + 'models: {aliases: {"": a}}', "models.aliases, the key '': should not be empty"),
        (BACKEND + "models: {aliases: {x: a}, default: x}", "models.default: x is an alias too"),
        (BACKEND + "models: {each: {a: {quue: {}}}}", "models.each.a.quue: unknown key; did you mean queue?"),
        (
            "backends: [{name: m, managed: {model: m, command: sh}}]\nmodels: {default: zzz}",
            "models.default: there is no model zzz; known: ",
        ),
        (
            "backends: [{url: 'http://a', slot_save_path: kv}, {name: b, url: 'http://b', slot_save_path: kv/b}]",
            "backends[1].slot_save_path: and that of backends[0] are one inside the other",
        ),
        (
            "backends: [{url: 'http://a', slot_save_path: kv}]\nstore: {meta_dir: ./kv}",
            "backends[0].slot_save_path: is store.meta_dir too",
        ),
        (BACKEND + "store: {directory: kv, meta_dir: ./kv}", "store.directory: is store.meta_dir too"),
        (
            "backends: [{url: 'http://a', slot_save_path: a}, {name: b, url: 'http://b', slot_save_path: b}]\n"
            "store: {directory: kv}",
            "backends[1].slot_save_path: with store.directory it must be that of backends[0]",
        ),
        (
            "backends: [{managed: {model: m, command: sh}}, {name: b, url: 'http://b', slot_save_path: b}]\n"
            "store: {directory: kv}",
            "backends[1].slot_save_path: with store.directory it must be that of backends[0]",
        ),
    ],
)
def test_a_fault_says_where_and_what_would_be_right(faults: Faults, text: str, fault: str) -> None:
    """Each fault starts with its path in the file."""
    found = faults(text)
    assert any(line.startswith(fault) for line in found), found


@pytest.mark.parametrize(
    "text",
    [
        "backends: [{url: 'http://b', api_key: 31337}]",
        BACKEND + "auth: {admin_key: 31337}",
        BACKEND + "auth: {admin_key: '31337'}",
    ],
)
def test_no_fault_repeats_a_secret(faults: Faults, text: str) -> None:
    """A wrong key is still a secret."""
    assert "31337" not in "".join(faults(text))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_this_machine_alone_needs_no_keys(load: Load, host: str) -> None:
    """Whatever name its loopback goes by."""
    assert load(BACKEND + f"listen: {{host: '{host}'}}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "2001:db8::1", "0"])
def test_others_are_not_let_in_without_keys(load: Load, faults: Faults, tmp_path: Path, host: str) -> None:
    """The fault names both ways out; each of them is one."""
    text = BACKEND + f"listen: {{host: '{host}'}}\n"
    for more in (
        "",
        "auth: {allow_anonymous: off}",
        "auth: {allow_anonymous: 'no'}",
        "auth: {keys_file: }",
        "auth:",
    ):
        (fault,) = faults(text + more)
        assert fault.startswith(f"listen.host: {host} can be reached from other machines")
        assert "llamaslot keys add NAME" in fault
        assert "auth.allow_anonymous: true" in fault
    (tmp_path / "keys.json").write_text("{}")
    for more in ("allow_anonymous: true", "allow_anonymous: 'on'", "keys_file: keys.json"):
        assert load(text + f"auth: {{{more}}}").listen.host == host


def test_who_listens_nowhere_is_told_at_once(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not known now may be anybody's later."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert faults(BACKEND + "listen: {host: box}") == [
        "listen.host: box is not known: Name or service not known"
    ]


def test_without_the_engine_a_managed_server_needs_a_command(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault names what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert any(
        "pipx inject llamaslot xllamacpp" in line
        for line in faults("backends: [{managed: {model: smollm2}}]")
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("listen:\n  port: 1\n\thost: x\n", "line 3, column 1: "),
        ("listen: {port: 1\nstore: {}\n", "line 2, "),
        ("listen: {port: 1\nstore: {}\n", "(a bracket before it is not closed)"),
        (
            "backends:\n- name: a\n  url:http://b\nlisten: {}\n",
            "line 3, column 3: could not find expected ':' (a colon",
        ),
        (
            "listen:\n  port: 1\n host: b\n",
            "line 3, column 2: expected <block end>, but found '<block mapping start>' (is",
        ),
        (
            "listen:\n  port: 1\n    host: b\n",
            "mapping values are not allowed here (is this line indented as",
        ),
        ('a: "\\d"\n', "found unknown escape character 'd' (a text with \\ in it needs single quotes)"),
        ("listen:\n  port: 1\n  port: 2\n", "line 3, column 3: the key 'port' is there twice"),
        ("listen: !!python/object:os.system {}\n", "line 1, column 9: could not determine a constructor"),
        ("listen: 2026-13-45\n", "is not YAML: month must be in 1..12"),
        ("listen: \x01\n", "is not YAML: unacceptable character #x0001"),
        ("listen:\n  ? [port]\n  : 1\n", "line 2, column 5: a list or a mapping cannot be a key"),
        ("listen: !!int ''\n", "is not YAML: "),
        ("listen: !!timestamp soon\n", "is not YAML: "),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: but found another document"),
    ],
)
def test_what_is_not_yaml_has_its_line(faults: Faults, text: str, fault: str) -> None:
    """One fault, for nothing after it can be told."""
    (found,) = faults(text)
    assert fault in found


def test_a_port_that_is_a_list(faults: Faults) -> None:
    """It is compared with no other one."""
    (fault,) = faults("backends: [{managed: {model: m, command: ls, port: [1]}}]")
    assert fault.startswith("backends[0].managed.port: should be a whole number")


def test_a_merge_key_is_no_repetition(load: Load) -> None:
    """YAML's own way to share keys still works."""
    config = load("backends: [&b {url: 'http://b'}]\nqueue: {<<: {max_waiting: 3}, max_wait_s: 4}")
    assert (config.queue.max_waiting, config.queue.max_wait_s) == (3, 4.0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file, a directory and a file of bytes are one fault each."""
    for path in (tmp_path / "none.yaml", tmp_path, Path("/bin/sh")):
        with pytest.raises(ConfigError) as caught:
            Config.load(path)
        assert len(caught.value.faults) == 1
        assert caught.value.source == str(path)


# --- the documents


def test_every_key_is_documented() -> None:
    """docs/configuration.md has a row for each key, and none for a key that is not there."""
    rows = re.findall(r"^\| `([^`]+)`", (REPOSITORY / "docs/configuration.md").read_text(), re.M)
    assert sorted(set(rows) - {"backends[0].managed"}) == sorted(keys_of(Config))


def test_the_model_of_the_demo_is_fetched_first(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the fault says how to get it."""
    monkeypatch.setenv("LLAMASLOT_SMOLLM2", "/nowhere/at-all.gguf")
    (fault,) = faults("backends: [{managed: {model: smollm2}}]")
    assert fault.startswith("backends[0].managed.model: ")
    assert "make smollm2" in fault


def test_documented_defaults_are_the_defaults(load: Load) -> None:
    """Each default that the table gives literally is what an empty file has."""
    text = (REPOSITORY / "docs/configuration.md").read_text()
    config = load(BACKEND)
    for key, default in re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| `([^`]+)` \|", text, re.M):
        section, name = key.split(".")
        documented = load(f"{BACKEND}{section}: {{{name}: {default}}}")
        assert getattr(getattr(documented, section), name) == getattr(getattr(config, section), name), key
    managed = load("backends: [{managed: {model: m, command: sh}}]").backend.managed
    rows = dict(re.findall(r"^\| `backends\[0\]\.managed\.([a-z]+)` \| `(\d+)` \|", text, re.M))
    assert rows == {"slots": str(managed and managed.slots), "context": str(managed and managed.context)}


def test_the_guarded_routes_are_documented() -> None:
    """An operator finds what `passthrough.allow` may name."""
    text = (REPOSITORY / "docs/configuration.md").read_text()
    assert [route for route in get_args(Gate) if f"`{route}`" not in text] == []


def test_the_demo_has_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml at the top is what `make serve` runs, once the model is there."""
    monkeypatch.setenv("LLAMASLOT_SMOLLM2", __file__)
    config = Config.load(REPOSITORY / "config.yaml")
    assert config.backend.managed is not None
    assert (config.backend.managed.model, config.backend.managed.slots) == ("smollm2", 4)
    assert config.store.meta_dir.is_relative_to(REPOSITORY)


def test_the_other_form_in_the_demo_has_no_faults(load: Load) -> None:
    """The commented-out lines for a GPU box, uncommented in place of the demo's."""
    text = (REPOSITORY / "config.yaml").read_text()
    head, rest = text.split("  # The demo:")
    box = re.findall(r"^  # (- name: gpu0\n(?:  #   .*\n)+)", rest, re.M)[0].replace("  #   ", "    ")
    box = re.sub(r"^    api_key_file.*\n", "", box, flags=re.M)
    config = load(f"{head}  {box}\n" + rest[rest.index("\nstore:") :])
    assert config.backend.url == "http://127.0.0.1:8080"
    assert config.backend.slot_save_path == Path("/var/lib/llamaslot/kv")
