"""What must not travel with a job: Ray shows a job's environment and command to whoever may list jobs."""

import re

_NAMES = re.compile(
    r"(?i)(secret|passw(or)?d|passphrase|credential|private_?key|api_?key|access_?key|(^|_)auth(_|$)|(^|_)token(s?$|_)|(^|_)pat$|_key$)"
)
_HARMLESS = re.compile(r"(?i)(_path|_file|_mode|_url|_uri)$")  # where a secret lies is no secret
_MORE = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|xox[abp]-[\w-]{10,}|AIza[\w-]{35}|glpat-[\w-]{20,})")
_KINDS = (
    "ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector",
    "DiscordBotTokenDetector", "GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector",
    "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
_INSTEAD = (
    "Ray shows it to everybody who may list jobs. Give the nodes a role (instance profile, IRSA, workload identity), "
    "or mount a file or a Kubernetes secret on them"
)


def kinds(text: str) -> list[str]:
    """Kinds of secrets that `text` looks to hold, by detect-secrets' patterns; [] for none. No guessing by entropy."""
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    with transient_settings({"plugins_used": [{"name": name} for name in _KINDS]}):
        found = {secret.type for line in text.splitlines() for secret in scan_line(line)}
    return sorted(found | ({"access token"} if _MORE.search(text) else set()))


def named(name: str) -> bool:
    """Whether a variable is named like a secret, and not like the place of one."""
    return bool(_NAMES.search(name) and not _HARMLESS.search(name))


def refuse_variable(name: str, value: str) -> None:
    """ValueError if a variable is named like a secret or its value looks like one."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"--env {name!r}: a variable is NAME=VALUE")
    if named(name):
        raise ValueError(f"--env {name}: looks like a secret, and {_INSTEAD}")
    if found := kinds(value):
        raise ValueError(f"--env {name}: its value looks like a secret ({found[0]}), and {_INSTEAD}")


def refuse_command(words: list[str]) -> None:
    """ValueError if the command line of a job holds a secret."""
    for word in words:
        if found := kinds(word):
            start = f"{word[:12]}..." if len(word) > 16 else "an argument"
            raise ValueError(f"{start} looks like a secret ({found[0]}), and {_INSTEAD}")
