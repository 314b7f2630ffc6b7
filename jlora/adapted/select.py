"""Which leaves are adapted or trained: patterns on paths, and every refusal of a rule that says nothing or too much."""

import collections
import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.methods import Method
from jlora.methods.checks import check_alpha, check_integers, check_rank
from jlora.transform.sites import ADAPTABLE, KINDS, Site, Target, conventional

Pattern = str | Sequence[str] | Callable[[Site], bool]


@dataclasses.dataclass(frozen=True)
class Extra:
    """A leaf that is trained as it is, beside the factors: wholly, or some of its rows.

    Attributes:
      path: of the leaf.
      rows: the rows that are trained; None for all of it.
      added: None where the trained value stands in the leaf's place; else the number s of `leaf + s * trained`, whose
        start is zero: the bias of a low-rank branch.
    """

    path: str
    rows: tuple[int, ...] | None = None
    added: float | None = None


def known_sites(params: Any, named: Mapping[str, Any], sites: Iterable[Site | Target] | None) -> tuple[Site, ...]:
    """Sites of `sites=`, checked against the tree; else by Flax's conventions. Targets are their sites."""
    if sites is None:
        return conventional(params)
    given = tuple(sites) if isinstance(sites, Iterable) else None
    if given is None or not all(isinstance(site, Site | Target) for site in given):
        raise TypeError(f"sites= is what jlora.sites(fn, params, *args) gives, a sequence of Site, not {sites!r:.200}")
    known = tuple(site.site if isinstance(site, Target) else site for site in given)
    check_axes(known, "sites=")
    for site in known:
        shape = tuple(getattr(named.get(site.path), "shape", ()))  # a leaf may be a function, which has none
        if site.path not in named or shape != site.shape:
            found = f"shape {shape}" if site.path in named else "no such leaf"
            raise ValueError(f"sites= are those of another tree: {site.path!r} has shape {site.shape}, params: {found}")
    # The tree may be a copy in another dtype, in which a weight cannot be adapted any more.
    return tuple(dataclasses.replace(s, dtype=str(getattr(named[s.path], "dtype", s.dtype))) for s in known)


def check_axes(sites: Sequence[Site], where: str) -> None:
    """Raises ValueError unless every site is there once, and each axis of a weight that can be adapted once in it."""
    twice = [path for path, n in collections.Counter(site.path for site in sites).items() if n > 1]
    if twice:
        raise ValueError(f"{where}: {twice[0]!r} is there twice, with axes of its own each; keep one of them")
    for site in sites:
        if site.kind not in KINDS:
            raise ValueError(f"{where}: the kind of {site.path!r} is one of {', '.join(KINDS)}, not {site.kind!r}")
        axes = sorted((*site.in_axes, *site.out_axes, *site.stack_axes))
        if site.kind in ADAPTABLE and axes != list(range(len(site.shape))):
            raise ValueError(
                f"{where}: the axes of {site.path!r} ({list(site.in_axes)} -> {list(site.out_axes)}, stack "
                f"{list(site.stack_axes)}) are not each axis of its shape {site.shape} once"
            )


def select(
    known: Sequence[Site],
    targets: Pattern | None,
    *,
    read_from_program: bool,
    caller: str = "apply",
    done: str = "adapted",
) -> list[Site]:
    """The sites that `targets=` of a caller names, each of which can be adapted, or what else is `done` to them."""
    if targets is None:
        chosen = [site for site in known if site.kind in ("linear", "conv", "unknown")]
        if not chosen:
            tables = [site.path for site in known if site.kind == "embedding"]
            if read_from_program and tables:
                raise ValueError(
                    f"{caller}: the program only looks rows up, and tables are no default targets: choose them, as "
                    f"targets={tables[0]!r}. Leaves: {listing(known)}"
                )
            if read_from_program:
                raise ValueError(
                    f"{caller}: the program contracts none of the leaves with an input: {listing(known)}. {_BY_HAND}"
                )
            raise ValueError(
                f"{caller}: none of the leaves is a linear layer by Flax's conventions (a 'kernel'); pass "
                f"sites=jlora.sites(fn, params, *args) to read them from the program. Leaves: {listing(known)}"
            )
    elif callable(targets):
        matched = [site for site in known if targets(site)]
        chosen = [site for site in matched if site.kind in (*ADAPTABLE, "unknown")] or matched
        if not chosen:
            raise ValueError(f"targets= (a predicate) matches none of the {len(known)} weights: {listing(known)}")
    elif not isinstance(targets, re.Pattern | Iterable) or isinstance(targets, bytes | Mapping):
        raise TypeError(f"targets= is a pattern, a list of them or a predicate on Site, not {targets!r:.200}")
    else:
        patterns = [targets] if isinstance(targets, str | re.Pattern) else list(targets)
        hits = {pattern: _matches(pattern, known, "targets", done) for pattern in patterns}
        paths = {site.path for found in hits.values() for site in found}
        chosen = [site for site in known if site.path in paths]
    for site in chosen:
        check_adaptable(site, done)
    return chosen


def _matches(pattern: str, known: Sequence[Site], argument: str, done: str = "adapted") -> list[Site]:
    found = [site for site in known if search(pattern, site.path, argument)]
    if not found:
        able = [site.path for site in known if site.kind in (*ADAPTABLE, "unknown")]
        raise ValueError(_no_match(pattern, able or [site.path for site in known], argument))
    adaptable = [site for site in found if site.kind in (*ADAPTABLE, "unknown")]
    if adaptable:
        return adaptable
    site = found[0]
    if not site.dtype.startswith(("float", "bfloat")):
        raise ValueError(
            f"{argument}={pattern!r} matches {site.path!r}, whose dtype is {site.dtype}: only floating-point weights "
            f"can be {done}"
        )
    used = f" (used by {', '.join(site.uses)})" if site.uses else ""
    raise ValueError(
        f"{argument}={pattern!r} matches {site.path!r} of shape {site.shape}{used}, which no product contracts with an "
        f"input: it has no low-rank form; train it as it is with extras=. {_BY_HAND}"
    )


def check_adaptable(site: Site, done: str = "adapted") -> None:
    """Raises ValueError for a weight that has no factored form."""
    if not site.dtype.startswith(("float", "bfloat")):
        raise ValueError(f"{site.path!r} has dtype {site.dtype}: only floating-point weights can be {done}")
    if site.kind == "unknown":
        how = (
            f"the program uses its axes in ways that contradict each other ({', '.join(site.uses)})"
            if site.uses
            else "its name and rank do not tell which axes are contracted; pass sites=jlora.sites(fn, params, *args)"
        )
        raise ValueError(f"{site.path!r} of shape {site.shape} is ambiguous: {how}, or leave it out with targets=")
    if site.kind not in ADAPTABLE:
        raise ValueError(f"{site.path!r} of shape {site.shape} has no low-rank form; train it with extras=. {_BY_HAND}")


_BY_HAND = (
    "If one does, say along which axes: sites=[jlora.Site(path, shape, dtype, in_axes, out_axes, stack_axes, 'linear')]"
)


def warn_of_left_out(known: Sequence[Site], trained: Collection[str], *, read_from_program: bool) -> None:
    """Names the leaves of two axes or more that neither are adapted by default nor left out by a rule.

    Tables of embeddings, biases and norms are no default targets, by the names of Flax's conventions.
    """
    left = [site for site in known if is_left_out(site, trained)]
    if not left:
        return
    if read_from_program:
        which = [f"{s.path!r} {s.shape}{' (' + ', '.join(s.uses) + ')' if s.uses else ' (never read)'}" for s in left]
        why = f"no product contracts them with an input. Train them as they are with extras=. {_BY_HAND}"
    else:
        which = [f"{site.path!r} {site.shape}" for site in left]
        why = "their names do not tell their axes. Pass sites=jlora.sites(fn, params, *args)"
    warnings.warn(
        f"apply: {len(left)} weights of two axes or more stay as they are, since {why}, or leave them out with "
        f"targets=: {', '.join(which)}",
        stacklevel=4,  # of apply's caller: choose and this stand between
    )


def check_axes_known(known: Sequence[Site], paths: Collection[str], caller: str) -> None:
    """Raises ValueError for leaves, of these paths, that may be layers and whose names do not tell their axes."""
    odd = [s for s in known if s.path in paths and (s.kind == "unknown" or is_left_out(s, ()))]
    if odd:
        raise ValueError(
            f"{caller}: the names of {len(odd)} leaves do not tell their axes: pass sites=jlora.sites(fn, params, "
            f"*args). Leaves: {listing(odd)}"
        )


def is_left_out(site: Site, trained: Collection[str]) -> bool:
    """Whether a leaf is no target and may be a layer: two axes or more, and by its name no bias and no scale."""
    floating = site.dtype.startswith(("float", "bfloat"))
    if site.path in trained or site.kind != "other" or len(site.shape) < 2 or not floating:
        return False
    return site.path.rpartition("/")[2] not in ("bias", "scale")


def rules_of(method: Method, targets: Pattern | None, known: Sequence[Site]) -> list[Pattern | None]:
    """Rules of each part of the method for its targets; None for all linear layers and convolutions.

    Raises:
      ValueError: for targets where there can be none, or names that no weight has.
    """
    several = len(method.parts) > 1
    if several and targets is not None:
        raise ValueError(f"apply: each part of {method.name} has targets of its own: together(lora(8), (ia3(), 'mlp'))")
    rules: list[Pattern | None] = []
    for part, given in method.parts:
        rule = given if several else targets
        if not part.acts.adapts and rule is not None and rule != ():
            raise ValueError(f"apply: {part.name} trains leaves as they are and adapts none: leave targets= out")
        rule = rule if part.acts.adapts else ()
        rules.append(_own_targets(part, known) if rule is None and part.acts.targets else rule)
    return rules


def _own_targets(method: Method, known: Sequence[Site]) -> list[str]:
    """The patterns that the method goes by, each of which matches something."""
    for pattern in method.acts.targets:
        if not any(re.search(pattern, site.path) for site in known):
            raise ValueError(
                f"apply: {method.name} goes by the names of layers, and none of these weights has one that it knows "
                f"({pattern}): say which with targets=. Weights: {listing(known)}"
            )
    return list(method.acts.targets)


def select_parts(
    known: Sequence[Site],
    method: Method,
    rules: Sequence[Pattern | None],
    trained: Collection[str],
    *,
    read_from_program: bool,
) -> list[tuple[Site, int]]:
    """The sites, each with the number of the part of the method that adapts it.

    A part without a rule takes what no other one names, and what is not trained as it is.

    Raises:
      ValueError: if two parts take one site, or nothing is left for one of them.
    """
    taken: dict[str, int] = {}
    names = [part.name for part, _ in method.parts]
    for number, rule in sorted(enumerate(rules), key=lambda of: of[1] is None):
        found = select(known, rule, read_from_program=read_from_program)
        for site in found:
            other = taken.get(site.path)
            if rule is None and (site.path in trained or (other is not None and rules[other] is not None)):
                continue
            if other is not None:
                raise ValueError(
                    f"contradicting rules: {site.path!r} is adapted by {names[other]} and by {names[number]}, number "
                    f"{other + 1} and {number + 1} of {method.name}; give each targets of its own: (method, targets)"
                )
            taken[site.path] = number
        if found and len(rules) > 1 and number not in taken.values():
            raise ValueError(f"apply: the other parts of {method.name} leave {names[number]} no weight to adapt")
    return [(site, taken[site.path]) for site in known if site.path in taken]


def resolve(
    selected: Sequence[tuple[Site, int]], method: Method, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> tuple[Target, ...]:
    """The targets with their rank and alpha; the first pattern that matches wins."""
    for argument, given in (("ranks", ranks), ("alphas", alphas)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument}= is {{pattern: value}}, not {given!r:.200}")
    parts = [part for part, _ in method.parts]
    ranked = {i for i, part in enumerate(parts) if part.has_rank}
    scaled = {i for i in ranked if parts[i].acts.has_alpha}
    if not ranked and (ranks or alphas):
        raise ValueError(f"apply: {method.name} has no rank: leave ranks= and alphas= out")
    if not scaled and alphas:
        raise ValueError(f"apply: {method.name} has no alpha: leave alphas= out")
    ranks = {pattern: check_rank(value, f"ranks[{pattern!r}]") for pattern, value in ranks.items()}
    scales = {pattern: check_alpha(value, f"alphas[{pattern!r}]") for pattern, value in alphas.items()}
    for argument, patterns, able in (("ranks", list(ranks), ranked), ("alphas", list(scales), scaled)):
        paths = [site.path for site, i in selected if i in able]
        for pattern in patterns:
            if not any(search(pattern, path, argument) for path in paths):
                raise ValueError(_no_match(pattern, paths, argument))

    def first(rules: Mapping[str, Any], path: str, default: Any) -> Any:
        return next((value for pattern, value in rules.items() if search(pattern, path, "")), default)

    resolved = []
    for site, i in selected:
        part = parts[i]
        rank = first(ranks, site.path, part.rank) if i in ranked else 0
        alpha = first(scales, site.path, part.alpha) if i in scaled else part.alpha
        resolved.append(Target(site, rank, float(rank if alpha is None else alpha), i))
    return tuple(resolved)


def check_scale(site: Target, method: Method, where: str) -> None:
    """Raises ValueError unless a site's rank and alpha are such as `resolve` gives it."""
    if not method.has_rank:
        if isinstance(site.rank, bool) or isinstance(site.alpha, bool) or site.rank != 0 or site.alpha != 0:
            raise ValueError(
                f"{where}: {method.name} has no rank: rank and alpha must be 0, not {site.rank!r:.200} and "
                f"{site.alpha!r:.200}"
            )
        return
    check_rank(site.rank, f"{where}.rank")
    if check_alpha(site.alpha, f"{where}.alpha") is None:
        raise ValueError(f"{where}.alpha must be a finite number, not None")


def select_extras(named: Mapping[str, Any], extras: Any) -> tuple[Extra, ...]:
    """The leaves that `extras=` names, in tree order."""
    rules = {extras: None} if isinstance(extras, str | re.Pattern) else extras
    if not isinstance(rules, Iterable):
        what = "a function" if callable(rules) else f"{rules!r:.200}"
        raise TypeError(f"extras= takes patterns, or {{pattern: row numbers}}, not {what}")
    rules = rules if isinstance(rules, Mapping) else dict.fromkeys(rules)
    chosen: dict[str, Extra] = {}
    for pattern, rows in rules.items():
        found = [path for path in named if search(pattern, path, "extras")]
        if not found:
            raise ValueError(_no_match(pattern, list(named), "extras"))
        trainable = [p for p in found if is_trainable(named[p])]
        if not trainable:
            dtype = getattr(named[found[0]], "dtype", type(named[found[0]]).__name__)
            raise ValueError(f"extras={pattern!r} matches {found[0]!r}, whose dtype is {dtype}: it cannot be trained")
        for path in trainable:
            if not (rows is None or isinstance(rows, Iterable)):
                raise TypeError(f"extras[{pattern!r}] is None or a sequence of row numbers, not {rows!r}")
            extra = Extra(path, None if rows is None else check_integers(rows, f"extras[{pattern!r}]"))
            check_rows(extra, named[path])
            if path in chosen and chosen[path] != extra:
                raise ValueError(f"contradicting rules: extras= matches {path!r} twice, with different rows")
            chosen[path] = extra
    return tuple(chosen[path] for path in named if path in chosen)


def matching(paths: Collection[str], patterns: str | Sequence[str], argument: str) -> set[str]:
    """The paths in which one of the patterns is found, each of which matches something."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str | re.Pattern) else patterns:
        mine = {path for path in paths if search(pattern, path, argument)}
        if not mine:
            raise ValueError(_no_match(pattern, list(paths), argument))
        found |= mine
    return found


def is_trainable(leaf: Any) -> bool:
    """Whether a leaf can be trained as it is: a floating-point array."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def check_not_stored(named: Mapping[str, Any], extras: Sequence[Extra]) -> None:
    """Raises ValueError for quantised leaves that are to be trained as they are, wholly or in rows.

    Codes have no gradient; of a leaf of which some rows are trained all would be dequantised in every step.
    """
    odd = [extra.path for extra in extras if tree.is_stored(named[extra.path])]
    if odd:
        raise ValueError(
            f"{len(odd)} quantised leaves are to be trained as they are, first {odd[0]!r} "
            f"({tree.stored_as(named[odd[0]])}), and codes are not trained: jlora.dequantize(params, "
            f"targets={odd[0]!r}) holds it in full precision, or train factors of it"
        )


def check_rows(extra: Extra, leaf: Any) -> None:
    """Raises ValueError for rows that are there twice or that the leaf does not have."""
    if extra.rows is None:
        return
    shape = tuple(np.shape(leaf))
    bad = [row for row in extra.rows if not 0 <= row < shape[0]] if shape else list(extra.rows)
    if bad or not extra.rows or len(set(extra.rows)) != len(extra.rows):
        some = f"{list(extra.rows[:20])}{f' and {len(extra.rows) - 20} more' if len(extra.rows) > 20 else ''}"
        raise ValueError(f"extras: rows {some} of {extra.path!r} must be distinct and within {shape}")


def search(pattern: Any, path: str, argument: str) -> bool:
    """Whether a pattern is found in a path. Raises a ValueError, naming the argument, for what is no pattern."""
    try:
        return re.search(pattern, path) is not None
    except (re.error, TypeError) as error:
        raise ValueError(f"{argument}={pattern!r} is no regular expression: {error}") from error


def _no_match(pattern: Any, paths: Sequence[str], argument: str) -> str:
    near = ", ".join(map(repr, nearest(pattern, paths)))
    return (
        f"{argument}={getattr(pattern, 'pattern', pattern)!r} matches none of the {len(paths)} weights; the closest "
        f"are {near}"
    )


def nearest(pattern: Any, paths: Sequence[str]) -> list[str]:
    """The three paths that are nearest to a pattern that matches none, or to one of whose parts it is near."""
    pattern = getattr(pattern, "pattern", pattern)
    words = {path: path.split("/") + [path] for path in paths}
    score = {
        path: max(difflib.SequenceMatcher(None, pattern, word).ratio() for word in parts)
        for path, parts in words.items()
    }
    return sorted(paths, key=lambda path: -score[path])[:3]


def listing(known: Sequence[Site]) -> str:
    """The first dozen leaves with their shapes, for errors."""
    odd = lambda site: "" if site.dtype.startswith(("float", "bfloat")) else f" {site.dtype}"
    shown = [f"{site.path!r} {site.shape}{odd(site)}" for site in known[:12]]
    return ", ".join(shown) + (f", ... ({len(known) - 12} more)" if len(known) > 12 else "")
