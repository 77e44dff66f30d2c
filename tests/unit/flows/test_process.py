"""A process of ours bears closed streams, a reader that left, and proxies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import certifi
import pytest

ROOT = Path(__file__).parents[3]


def run(code, folder, **environment):
    """What a Python that runs this code in this folder prints, within a bare environment."""
    command = [sys.executable, "-P", "-c", f"import os, sys\n{code}"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IN_A_PROCESS = "from flows.runtime.process import own_process; own_process()\n"


def test_text_for_a_reader_that_left_is_dropped(tmp_path):
    code = (
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 2)\n" + IN_A_PROCESS + "\n"
        "print('x' * 100_000, file=sys.stderr); print('went on')"
    )

    assert run(code, tmp_path) == "went on"


def test_text_that_no_disk_has_room_for_is_dropped_and_the_exit_code_says_so(tmp_path):
    code = (
        "full = os.open('/dev/full', os.O_WRONLY); out = os.dup(1); os.dup2(full, 1)\n"
        "from flows.runtime.process import exit_code, own_process; own_process()\n"
        "print('x' * 100_000); print('y'); code = exit_code(0); os.write(out, b'%d' % code)\n"
    )

    assert run(code, tmp_path) == "1"


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_a_closed_stream_is_no_number_for_a_file(tmp_path, descriptor):
    code = f"""os.close({descriptor})
{IN_A_PROCESS}
os.write(int(sys.argv[1]) if len(sys.argv) > 1 else 1, b"")
assert open("file", "w").fileno() > 2
"""

    run(code, tmp_path)


def test_a_name_that_ascii_cannot_show_is_printed_with_a_backslash(tmp_path):
    found = run(IN_A_PROCESS + "print('\\u00fc')", tmp_path, PYTHONIOENCODING="ascii")

    assert found == "\\xfc"


@pytest.mark.parametrize("before", ["", "example.com", "*"])
def test_no_proxy_is_asked_for_loopback(tmp_path, before):
    code = IN_A_PROCESS + (
        "import urllib.request as r\n"
        "print(r.proxy_bypass('127.0.0.1:4200'), r.proxy_bypass('example.com'),"
        " r.proxy_bypass('example.org'), r.getproxies().get('all'))"
    )
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"}

    found = run(code, tmp_path, NO_PROXY=before, **proxies).split()

    assert [word in ("1", "True") for word in found[:3]] == [True, before != "", before == "*"]
    assert found[3] == "None"


def test_certificates_that_cannot_be_read_keep_no_client_from_loopback(tmp_path):
    code = IN_A_PROCESS + "import httpx; httpx.Client(); print(os.environ.get('SSL_CERT_FILE'))"

    assert run(code, tmp_path, SSL_CERT_FILE=str(tmp_path / "gone.pem")).split() == ["None"]
    assert run(code, tmp_path, SSL_CERT_FILE=certifi.where()).split() == [certifi.where()]


def test_the_current_folder_is_on_nobodys_import_path(tmp_path):
    code = (
        "sys.path.insert(0, '')\n"
        "from flows.runtime.import_path import forget_current_folder; forget_current_folder()\n"
        "import subprocess; import colorsys\n"
        "subprocess.run([sys.executable, '-c', 'import colorsys'], check=True)\n"
    )
    (tmp_path / "colorsys.py").write_text("raise SystemExit('a file of the current folder ran')")

    run(code, tmp_path, PYTHONPATH=f":{ROOT}")


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("tasks.py", []),
        ("numpy.py", []),
        ("flows/notes.txt", []),
        ("flows/__init__.py", ["-P"]),  # Python looks for what -m names in the current folder first
    ],
)
def test_the_command_starts_in_a_folder_that_holds_names_of_ours(tmp_path, file, options):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("raise SystemExit('a file of the current folder ran')")

    done = subprocess.run(
        [sys.executable, *options, "-m", "flows.batch", "--help"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


KILLED = """
import os, signal
from multiprocessing import get_context
from flows.runtime.dask import _start_quiet_tracker
_start_quiet_tracker()
shared = get_context("spawn").Lock()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_coordinator_leaves_no_complaint_of_what_its_workers_shared():
    # The tracker holds stderr open, so this waits for its end too.
    done = subprocess.run([sys.executable, "-c", KILLED], stderr=subprocess.PIPE, check=False)

    assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")
