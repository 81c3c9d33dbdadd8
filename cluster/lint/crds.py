"""A document against a CustomResourceDefinition, more strictly than the API server: unknown fields are errors."""

import functools
from pathlib import Path

import yaml

_NOTES = {"description", "title", "default", "example", "externalDocs"}


def errors(document: dict, folder: str) -> list[tuple[str, str]]:
    """(where, message) of what the CRD of the document's kind, in a file of `folder`, refuses.

    ValueError if the folder has none for it.
    """
    import jsonschema

    group, _, served = str(document["apiVersion"]).partition("/")
    schema = _schemas(folder).get((group, served, str(document["kind"])))
    if schema is None:
        raise ValueError(f"{folder}: no CRD for {document['kind']} of {document['apiVersion']}")
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [(".".join(map(str, error.absolute_path)), " ".join(error.message.split())[:200]) for error in found]


@functools.lru_cache(maxsize=4)
def _schemas(folder: str) -> dict:
    if not Path(folder).is_dir():
        raise ValueError(f"--crds {folder}: no such folder")
    found = {}
    for file in sorted(Path(folder).glob("*.y*ml")):
        try:
            for crd in yaml.load_all(file.read_text(), yaml.CSafeLoader):
                if isinstance(crd, dict) and crd.get("kind") == "CustomResourceDefinition":
                    found |= _versions(crd["spec"])
        except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: no CRD that can be read: {' '.join(str(error).split())[:200]}") from None
    return found


def _versions(spec: dict) -> dict:
    found = {}
    for version in spec["versions"]:
        schema = _closed(version["schema"]["openAPIV3Schema"])
        # The API server knows these of every kind, and a structural schema may leave them out.
        known = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
        schema["properties"] = {**schema.get("properties", {}), **known}
        found[spec["group"], version["name"], spec["names"]["kind"]] = schema
    return found


def _closed(schema: dict) -> dict:
    """JSON Schema of a structural schema: https://kubernetes.io/docs/tasks/extend-kubernetes (CRDs)."""
    out = {key: value for key, value in schema.items() if key not in _NOTES and not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        out["properties"] = {name: _closed(inside) for name, inside in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = _closed(schema[key])
    for key, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(out.get(key), bool) and out.pop(key) and bound in out:  # OpenAPI 3.0: a flag of the other
            out[key] = out.pop(bound)
    if out.pop("nullable", False) and "type" in out:
        out["type"] = [out["type"], "null"]
    return out
