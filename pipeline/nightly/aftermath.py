"""What follows a night's outcome: its page, who is told, what is cleared up. None of it changes the outcome; what fails
is said, and tried again by the next run of the same tick.
"""

import os
import re
from collections.abc import Callable

from pipeline import registry, storage
from pipeline.nightly import page
from pipeline.nightly.config import NightConfig
from pipeline.nightly.night import Night

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def after(night: Night) -> bool:
    """Whether all of it was done."""
    steps: list[Callable[[Night], None]] = [_pages, _mirror, _tell, _clear]
    done = True
    for step in steps:
        try:
            step(night)
        except Exception as error:  # the outcome stands, whatever a mail server or a tracker says
            night.say(f"warning: {step.__name__.strip('_')}: {' '.join(str(error).split()) or type(error).__name__}")
            done = False
    return done


def _pages(night: Night) -> None:
    config, folder = night.config, storage.join(night.config.root, "nights")
    storage.write(storage.join(folder, f"{night.tick}.html"), page.night(config, night.record.doc).encode())
    storage.write(storage.join(folder, "index.html"), page.nights(config).encode())


def _tell(night: Night) -> None:
    doc, config = night.record.doc, night.config
    kinds = {doc["outcome"]} | ({"held"} if night.results.get("data", {}).get("verdict") == "held" else set())
    if not config.notify or not kinds & {*config.notify_on}:
        return
    import apprise

    urls = [_expanded(url) for url in config.notify]
    how = {"promoted": apprise.NotifyType.SUCCESS, "failed": apprise.NotifyType.FAILURE}
    whom = apprise.Apprise()
    for number, url in enumerate(urls):
        if not whom.add(url):  # the address may hold a token: it is not repeated
            raise ValueError(f"notify {number} is no address that apprise knows")
    title = f"{config.name}: {doc['outcome']} ({night.tick})"
    told = whom.notify(title=title, body=doc["reason"], notify_type=how.get(doc["outcome"], apprise.NotifyType.INFO))
    if not told:
        raise RuntimeError("some of those to be told could not be reached")


def _expanded(url: str) -> str:
    missing = [name for name in _VARIABLE.findall(url) if name not in os.environ]
    if missing:
        raise ValueError(f"notify wants {missing[0]} from the environment, which has none")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], url)


def _mirror(night: Night) -> None:
    """MLflow's registry, if it is wanted: a version of the same name with our version as a tag, and the alias. It is a
    copy for people to look at; MLflow's alias knows no compare-and-swap, and nothing of ours reads it."""
    if not night.config.mlflow or night.record.doc["outcome"] != "promoted":
        return
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise RuntimeError("mlflow: true needs MLflow: pip install mlflow-skinny") from None
    config, version, client = night.config, night.results["promote"]["version"], MlflowClient()
    try:
        client.create_registered_model(config.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    ours = [v for v in client.search_model_versions(f"name = '{config.name}'") if v.tags.get("millstream") == version]
    path = registry.version_path(config.registry, config.name, version)
    if not ours:
        source = path if storage.is_remote(path) else f"file://{path}"
        ours = [client.create_model_version(config.name, source, tags={"millstream": version})]
    client.set_registered_model_alias(config.name, "champion", ours[0].version)


def _clear(night: Night) -> None:
    clear(night.config)


def clear(config: NightConfig) -> dict:
    """Deletes versions that nobody needs (`registry.collect`) and the runs of older nights: {versions, runs}."""
    versions = registry.collect(config.registry, config.name, config.keep)
    folder = storage.join(config.root, "runs")
    try:
        runs = {file.path.partition("/")[0] for file in storage.list_files(folder)}
    except FileNotFoundError:
        runs = set()
    gone = sorted(runs)[: -config.keep_runs]
    for run in gone:
        storage.delete_tree(storage.join(folder, run))
    return {"versions": versions, "runs": gone}
