"""What is lost or repeated under faults: python benchmarks/faults.py [--out FILE.json] [--check] [--smoke]"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from gates import ROOT, Benchmark, Findings, Gate, main
from pydantic import Field, PositiveInt

from mi_ray import storage

SHARDS = 8
RUN = [
    *("--smoke", "--prompts.limit", str(SHARDS), "--generate.prompts-per-shard", "1"),
    *("--generate.preview-prompts", "0", "--resources.shard-timeout-s", "60"),
]
WAIT_S = 600
KINDS = ("driver", "actor", "worker", "nan", "oom", "hang", "s3")
KEY = ["prompt_id", "candidate_index"]


class FaultsBenchmark(Benchmark):
    """What is lost, duplicated or changed of a generation run under each kind of fault, and how much work is repeated?

    The same command is given again until it succeeds; the rows are compared with an undisturbed run's. A candidate in
    which the model says NaN must be there once, as an error.
    """

    kinds: list[str] = Field(
        list(KINDS), description="which faults: driver, actor, worker (killed), nan, oom, hang, s3"
    )
    driver_kills: PositiveInt = Field(20, description="runs whose driver is killed; the other kinds get half as many")
    seed: int = Field(0, description="of the moments")

    def answer(self) -> Findings:
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
        counts = {kind: self.driver_kills if kind == "driver" else -(-self.driver_kills // 2) for kind in self.kinds}
        if self.smoke:
            counts = dict.fromkeys([kind for kind in ("driver", "actor", "oom") if kind in self.kinds], 1)
        lots = random.Random(self.seed)
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            undisturbed = Disturbed(Path(folder) / "undisturbed", "none", lots)
            undisturbed.run()
            truth = undisturbed.rows()
            for kind, count in counts.items():
                runs = [Disturbed(Path(folder) / f"{kind}-{number}", kind, lots) for number in range(count)]
                for run in runs:
                    run.run()
                    print(f"{kind}: happened {run.happened}, {run.commands} commands", file=sys.stderr, flush=True)
                rows.append({"fault": kind, "runs": count, **summed([run.against(truth) for run in runs])})
        totals = {name: sum(row[name] for row in rows) for name in ("lost", "duplicated", "changed", "events_off")}
        gates = {name: Gate(total, maximum=0) for name, total in totals.items()}
        gates["happened"] = Gate(sum(r["happened"] for r in rows) / sum(r["runs"] for r in rows), minimum=0.8)
        return Findings(rows, gates)


def summed(results: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(result[name] for result in results) for name in results[0]}


class Disturbed:
    """One run, with a fault of one kind at a random moment."""

    def __init__(self, folder: Path, kind: str, lots: random.Random):
        self.folder, self.kind = folder, kind
        self.after, self.pause = lots.randrange(SHARDS - 1), lots.uniform(0, 1.5)
        self.seed = lots.randrange(2**31)
        self.run_dir = str(folder / "run")
        self.commands, self.happened = 0, False
        folder.mkdir(parents=True)

    # -------------------------------------------------------------------------------------- the run
    def run(self):
        """Give the command until it succeeds; the fault comes while the first one runs.

        Raises:
            RuntimeError: it fails again and again.
        """
        with flaky_store(self.seed) if self.kind == "s3" else nothing() as store:
            self.environment = os.environ | {"FAULT_FOLDER": str(self.folder), "PYTHONPATH": str(ROOT)}
            if self.kind in ("nan", "oom", "hang"):
                self.environment["FAULT"] = self.kind
            if store:
                self.environment |= store.environment
                self.run_dir = f"s3://runs/{self.folder.name}"
                os.environ |= store.environment
            for _ in range(4):
                self.commands += 1
                if self._command() == 0:
                    break
            else:
                log = (self.folder / "log").read_text()[-3000:]
                raise RuntimeError(f"{self.kind}: the command failed {self.commands} times\n{log}")
            self.happened |= (self.folder / "happened").exists() or bool(store and store.refused)
            self.table = storage.read_tables(storage.join(self.run_dir, "round-0", "candidates")).to_pandas()
            self.receipts = self._receipts()
            self.events = storage.read_lines(storage.join(self.run_dir, "events.jsonl"))

    def _command(self) -> int:
        command = [sys.executable, str(ROOT / "benchmarks" / "faulty_run.py"), *RUN, "--run-dir", self.run_dir]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=self.environment)
            try:
                if self.kind in ("driver", "actor", "worker") and not self.happened:
                    self._kill(process)
                return process.wait(WAIT_S)
            finally:
                process.kill()

    def _kill(self, driver: subprocess.Popen):
        """Kill the driver, the actor that wrote last or began, or any worker, once so many shards are committed."""
        deadline = time.monotonic() + WAIT_S
        while driver.poll() is None and time.monotonic() < deadline:
            if len(self._receipts()) >= self.after and self._begun():
                break
            time.sleep(0.02)
        time.sleep(self.pause)
        if driver.poll() is not None:
            return
        workers = [pid for pid, name in descendants(driver.pid) if name.startswith("ray::")]
        actors = [pid for pid, name in descendants(driver.pid) if "FaultyGenerator" in name]
        victims = {"driver": [driver.pid], "actor": actors, "worker": workers}[self.kind]
        if victims:
            os.kill(victims[self.seed % len(victims)], signal.SIGKILL)
            self.happened = True

    def _begun(self) -> list[str]:
        return [file.read_text() for file in (self.folder / "begun").glob("[!.]*")]

    def _receipts(self) -> list[dict]:
        folder = storage.join(self.run_dir, "round-0", "candidates", storage.COMMITS)
        return [storage.read_json(storage.join(folder, name)) for name in storage.list_names(folder) if name[0] != "."]

    # -------------------------------------------------------------------------------------- what came of it
    def rows(self) -> pd.DataFrame:
        return self.table.sort_values(KEY).reset_index(drop=True)

    def against(self, truth: pd.DataFrame) -> dict[str, int]:
        """Rows lost, duplicated and changed against the undisturbed run's; shards begun again; events off."""
        mine = self.rows()
        keys, wanted = ({tuple(key) for key in frame[KEY].itertuples(index=False)} for frame in (mine, truth))
        both = truth.merge(mine.drop_duplicates(KEY), on=KEY, suffixes=("", "_mine"))
        failed = both["error_mine"].notna()
        same = (both["seed"] == both["seed_mine"]) & (
            failed | np.isclose(both["score_mitune"], both["score_mitune_mine"], rtol=1e-3)
        )
        kept_off = (both["kept"] != both["kept_mine"]) & ~both["prompt_id"].isin(both["prompt_id"][failed])
        written = sum(event["event"] == "shard_written" for event in self.events)
        expected_errors = 1 if self.kind == "nan" and self.happened else 0
        return {
            "happened": int(self.happened),
            "commands": self.commands,
            "rows": len(mine),
            "lost": len(wanted - keys),
            "duplicated": len(mine) - len(keys),
            "changed": int((~same | kept_off).sum()) + abs(int(failed.sum()) - expected_errors),
            "shards_repeated": len(self._begun()) - len(self.receipts),
            "events_off": abs(written - len(self.receipts)),
        }


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """(process id, command) of all that a process has started, and they in turn."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    for child in parents:
        ancestor = parents.get(child)
        while ancestor and ancestor != pid:
            ancestor = parents.get(ancestor)
        if ancestor == pid:
            yield child, names.get(child, "")


# ------------------------------------------------------------------------------------------ a store that fails
@contextmanager
def nothing() -> Iterator[None]:
    yield None


class FlakyStore:
    """An S3 server that answers one request in seven with 500 or 503, is slow at another, and is honest at the rest."""

    def __init__(self, application: Callable, seed: int):
        self.application, self.lots, self.lock = application, random.Random(seed), threading.Lock()
        self.refused, self.environment = 0, {}

    def __call__(self, environ, start_response):
        with self.lock:
            lot = self.lots.random()
        if lot < 1 / 7 and environ["PATH_INFO"] != "/runs":
            self.refused += 1
            status, code = (
                ("503 Slow Down", "SlowDown") if lot < 1 / 14 else ("500 Internal Server Error", "InternalError")
            )
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]
        if lot > 6 / 7:
            time.sleep(0.3)
        return self.application(environ, start_response)


@contextmanager
def flaky_store(seed: int) -> Iterator[FlakyStore]:
    """The server, with an empty bucket `runs`; needs the extra `test`."""
    try:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server
    except ImportError as error:
        raise ValueError(f"kinds: s3 needs a server ({error}); pip install 'mi-ray[test]' or leave it out") from error
    store = FlakyStore(DomainDispatcherApplication(create_backend_app), seed)
    silent = type("Silent", (WSGIRequestHandler,), {"log": lambda self, *arguments: None})
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        import boto3

        given = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=store.environment["AWS_ENDPOINT_URL"], **given).create_bucket(Bucket="runs")
        yield store
    finally:
        server.shutdown()


if __name__ == "__main__":
    main(FaultsBenchmark)
