"""A night on one page, and the list of nights: ROOT/nights/TICK.html and index.html, made from records alone."""

from datetime import UTC, datetime

from pipeline import registry
from pipeline.evaluation import markup, report
from pipeline.evaluation.markup import escaped, shown
from pipeline.nightly import drift, record
from pipeline.nightly.config import NightConfig
from pipeline.nightly.profile import Profile
from pipeline.training import checkpoint

LISTED = 100  # nights on the index page: each is a file to read


def night(config: NightConfig, doc: dict) -> str:
    """HTML of one night's record."""
    stages = doc["stages"]
    decision = stages.get("score", {}).get("decision")
    numbers = decision["numbers"] if decision else {}
    tiles = [("outcome", doc["outcome"])]
    tiles += [(name.replace("_", " "), numbers[name]) for name in ("accuracy", "champion_accuracy", "kid",
              "champion_kid", "p_value") if numbers.get(name) is not None]  # fmt: skip
    tiles += [("new images", stages["data"]["added"])] if "data" in stages else []
    tiles += [("took", f"{doc.get('ended', doc['began']) - doc['began']:,.0f} s")]
    sections = [("", report.headline(tiles) + f'<p class="warning">{escaped(doc["reason"])}</p>')]
    if decision:
        sections.append(("Gate", _checks(decision["checks"])))
    if "report" in stages.get("data", {}):
        found = stages["data"]
        told = drift.Report(**found["report"] | {"findings": [drift.Finding(**f) for f in found["report"]["findings"]]})
        sections.append(("New data", drift.section(told, Profile(**found["before"]), Profile(**found["now"]))))
    if "train" in stages:
        rows = checkpoint.read_metrics(stages["train"]["run"])
        drawn = [{k: v for k, v in row.items() if k != "time" and not k.startswith("val_")} for row in rows]
        sections.append(("Training", report.curves(drawn, [])))
    sections.append(("Stages", report.facts({name: _short(result) for name, result in stages.items()})))
    sections.append(("Nights", '<p><a href="index.html">all nights</a></p>'))
    return report.page(f"{config.name}: night {doc['tick']}", config.source, sections)


def nights(config: NightConfig) -> str:
    """HTML of the list of nights, the newest first, and of who has been champion."""
    rows = []
    for tick in record.names(config.root)[:LISTED]:
        doc = record.read(config.root, tick)
        numbers = doc["stages"].get("score", {}).get("decision", {}).get("numbers", {})
        accuracy = numbers.get("accuracy", numbers.get("kid"))
        rows.append(
            f'<tr><td class="name"><a href="{escaped(tick)}.html">{escaped(tick)}</a></td>'
            f"<td>{escaped(doc['outcome'] or 'not ended')}</td><td>{escaped(shown(accuracy))}</td>"
            f"<td>{escaped(doc['reason'])}</td></tr>"
        )
    past = [
        f"<tr><td>{entry['epoch']}</td><td>{escaped(entry['action'])}</td><td>{escaped(entry['version'])}</td>"
        f"<td>{escaped(entry['time'])}</td><td>{escaped(entry['why'])}</td></tr>"
        for entry in registry.history(config.registry, config.name)
    ]
    now = registry.champion(config.registry, config.name)
    tiles = [("nights", len(rows)), ("champion", now.version), ("since", now.time[:10] or None)]
    sections = [
        ("", report.headline(tiles)),
        ("Nights", markup.table(["night", "outcome", "challenger", "why"], rows, "list")),
        ("Champions", markup.table(["epoch", "", "version", "time", "why"], past, "list")),
    ]
    made = f"as of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return report.page(f"{config.name}: nights", made, sections)


def _checks(checks: list[dict]) -> str:
    rows = [
        f'<tr><td class="name">{escaped(check["name"])}</td>'
        f"<td>{'passed' if check['passed'] else '<b class=bad>failed</b>'}</td>"
        f"<td>{escaped(shown(check['value']))}</td><td>{escaped(shown(check['limit']))}</td><td>{escaped(check['detail'])}</td></tr>"
        for check in checks
    ]
    return markup.table(["check", "", "value", "limit", ""], rows, "list")


def _short(result: dict) -> dict:
    """Of a stage's result what has no section of its own."""
    return {
        name: value for name, value in result.items() if name not in ("report", "before", "now", "decision", "reason")
    }
