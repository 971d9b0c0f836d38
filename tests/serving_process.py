"""A service as a process of its own: `python serving_process.py DATA_DIR [SECONDS] [KEYS]`, told its port on standard output."""

import sys
from pathlib import Path

from manyicl.serving import app
from manyicl.serving.settings import Limits, Settings
from serving_fixtures import FakeBackend


def main(data_dir: Path, delay: float, api_keys: Path | None) -> None:
    bind = app._bind

    def bind_and_tell(settings: Settings) -> object:
        listener = bind(settings)
        print(listener.getsockname()[1], flush=True)
        return listener

    app._bind = bind_and_tell  # type: ignore[assignment]
    backend = FakeBackend(data_dir / "fake")
    backend.delay = delay
    limits = Limits(max_files=10**6, max_tasks=10**6, max_unfinished_jobs=10**6)
    app.run_server(Settings(data_dir, port=0, api_keys=api_keys, limits=limits), backend)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
