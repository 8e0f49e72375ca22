"""The Starlette app that serves the page of a run, or of several side by side."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from federation.page import curves, shown
from federation.page.folder import RunFolder

HERE = Path(__file__).parent
MOST_ROWS = {"clients": 100, "rounds": 50, "held": 40}  # of a table, unless all of them are asked for
MOST_CLASSES = 30


LIVE = "starting", "running"


def page(folders: Sequence[Path], seen: Callable[[], object] = lambda: None, stale: str | None = None) -> Starlette:
    """Return an app that shows these run folders, see RunFolder. It calls `seen` whenever somebody looks."""
    runs = [RunFolder(folder, stale) for folder in folders]
    pages = Pages(runs, _labels(folders), seen)
    routes = [Route("/", pages.first), Mount("/static", StaticFiles(directory=HERE / "static"))]
    routes += [Route("/runs/{number:int}", pages.one_of_several)]
    return Starlette(routes=routes, middleware=[Middleware(GZipMiddleware, minimum_size=2000)])


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder, the last part of its path; all of it where two are the same."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


class Pages:
    """What answers requests. A browser that has a page already gets it again only if something has changed."""

    def __init__(self, runs: Sequence[RunFolder], labels: Sequence[str], seen: Callable[[], object]) -> None:
        self.runs, self.labels, self.seen = runs, labels, seen
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        environment.filters |= {"seconds": shown.seconds, "size": shown.size, "number": shown.number}
        self.templates = Jinja2Templates(env=environment)

    def first(self, request: Request) -> Response:
        return self.run(request, 0) if len(self.runs) == 1 else self.compare(request)

    def one_of_several(self, request: Request) -> Response:
        number = request.path_params["number"]
        if not 1 <= number <= len(self.runs):
            raise HTTPException(404)
        return self.run(request, number - 1)

    def run(self, request: Request, number: int) -> Response:
        """Show one run."""
        folder = self.runs[number]
        view = folder.refresh()
        whole = request.query_params.get("all", "")
        limits = MOST_ROWS | dict.fromkeys([whole] if whole in MOST_ROWS else [], 10**9)
        more = {"view": view, "limits": limits, "most_classes": MOST_CLASSES, "whole": whole}
        more |= {"several": len(self.runs) > 1, "runs": view["status"] in LIVE}
        state = [view["version"], folder.log_version()]
        return self._answer(request, "run.html", state, lambda: more | {"log": folder.log()})

    def compare(self, request: Request) -> Response:
        """Show several runs side by side."""
        views = [folder.refresh() for folder in self.runs]
        return self._answer(request, "compare.html", [view["version"] for view in views], lambda: self._compared(views))

    def _compared(self, views: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [view | {"label": label} for view, label in zip(views, self.labels, strict=True)]
        names = list(dict.fromkeys(metric["name"] for view in views for metric in view["latest"]))
        charts = curves.compared([(row["label"], row["rounds"]) for row in rows])
        return {"views": rows, "names": names, "charts_data": charts, "differing": differing(views),
                "runs": any(view["status"] in LIVE for view in views)}  # fmt: skip

    def _answer(
        self, request: Request, template: str, state: Sequence[str], context: Callable[[], dict[str, Any]]
    ) -> Response:
        """Render a page, unless the browser has it as it is in this state."""
        self.seen()
        described = repr([request.url.path, request.url.query, *state])
        tag = f'W/"{hashlib.sha256(described.encode()).hexdigest()[:24]}"'
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"ETag": tag})
        return self.templates.TemplateResponse(request, template, context(), headers={"ETag": tag})


def differing(views: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys of the run config in which runs differ, with the value of each run."""
    configs = [{row["key"]: row["value"] for row in view["config"]} for view in views]
    keys = dict.fromkeys(key for config in configs for key in config if key not in ("out", "resume"))
    found = [(key, [config.get(key, "–") for config in configs]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]
