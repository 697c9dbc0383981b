"""Hypothesis strategies for every record, drawn from the limits that its fields declare."""

import sys
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import DIGEST, NAME, SEALED, Record, bare, fields_of
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.protocol.records import Aggregation, Lora

PATTERNS = {
    NAME: r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
    DIGEST: r"[0-9a-f]{64}",
    SEALED: r"([0-9a-f]{64})?",
}
LONGEST_PATH = 255
UNICODE = st.characters(exclude_categories=["Cs"])


def records(kind: type[Record]) -> st.SearchStrategy[Record]:
    """Records of a type; reason, metrics and completions are as the status asks for."""
    fields = {f.name: values(f.kind) | _default(f.default) for f in fields_of(kind)}

    def build(arguments: dict[str, Any]) -> Record:
        try:
            return kind(**arguments)
        except CrossFLError:
            if kind is Aggregation:
                early = {"closes": "all", "job_seconds": None, "served_mean": None}
                return kind(**arguments | early | {"planner": "fixed"})
            if kind is Lora:
                kinds = ("virtual_tokens", "rank_pattern", "target_modules", "modules_to_save")
                return kind(**{k: v for k, v in arguments.items() if k not in kinds})
            mended = arguments | {"reason": "its status asks for one"}
            if kind is EvaluationManifest and mended["status"] == "absent":
                mended |= {"metrics": None, "completions": ()}
            return kind(**mended)

    return st.fixed_dictionaries(fields).map(build)


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type."""
    kind = bare(kind)[0]
    match kind:
        case inspect.IntType():
            return st.integers(kind.ge, kind.le)
        case inspect.FloatType():
            most = sys.float_info.max if kind.le is None else kind.le
            return st.floats(kind.ge, kind.lt or most, exclude_max=kind.lt is not None)
        case inspect.BoolType():
            return st.booleans()
        case inspect.UnionType():
            return st.one_of(*map(values, kind.types))
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.StrType(pattern=str() as pattern):
            return st.from_regex(PATTERNS[pattern], fullmatch=True)
        case inspect.StrType(max_length=most) if most == LONGEST_PATH:
            return st.from_regex(r"[a-zé -]{1,9}(/[a-z]{1,9}\.x){0,3}", fullmatch=True)
        case inspect.StrType():
            return st.text(UNICODE, min_size=kind.min_length or 0, max_size=20)
        case inspect.VarTupleType():
            return st.lists(values(kind.item_type), max_size=3).map(tuple)
        case inspect.TupleType():
            return st.tuples(*map(values, kind.item_types))
        case inspect.DictType():
            most = 3 if kind.max_length is None else min(kind.max_length, 3)
            keys, entries = values(kind.key_type), values(kind.value_type)
            return st.dictionaries(keys, entries, max_size=most)
        case inspect.StructType() if issubclass(kind.cls, Record):
            return records(kind.cls)
    raise TypeError(kind)


def _default(default: Any) -> st.SearchStrategy[Any]:
    return st.nothing() if default is msgspec.NODEFAULT else st.just(default)
