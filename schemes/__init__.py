"""The registry of positional schemes, and how `pos` is read.

A file of this folder is a scheme of the file's name. `pos` is one of

    rope                            a scheme, in every layer
    rope+alibi                      several in every layer (schemes/_combined.py)
    [rope, rope, none]              a pattern, which cycles over the layers
    my_file.py:MyScheme             a class of a file outside of this folder, also within the forms above

Options are flat for a single scheme, {base: 5e5}, and by name for several, {rope: {base: 5e5}, alibi: {}}.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from nanope.errors import first_line, nearest
from schemes._combined import Combined
from schemes.base import Context as Context
from schemes.base import Scheme as Scheme


def registry() -> dict[str, type[Scheme]]:
    """Name → class: `none`, and the last class of each file of this folder that is a Scheme."""
    found = {"none": Scheme}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base" and not module.name.startswith("_"):
            content = vars(importlib.import_module(f"schemes.{module.name}"))
            own = [c for c in content.values() if isinstance(c, type) and issubclass(c, Scheme)]
            found[module.name] = [c for c in own if c.__module__ == f"schemes.{module.name}"][-1]
    return found


SCHEMES: dict[str, type[Scheme]] = registry()


# ---- how `pos` is read


def pattern(pos: str | list[str]) -> list[list[str]]:
    """The schemes of each layer of the pattern, as they stand in `pos`: [["rope", "alibi"]] for rope+alibi."""
    return [[name.strip() for name in entry.split("+")] for entry in ([pos] if isinstance(pos, str) else pos)]


def names_in(pos: str | list[str]) -> list[str]:
    """The different schemes in `pos`, in order."""
    return list(dict.fromkeys(name for names in pattern(pos) for name in names))


def single(pos: str | list[str]) -> bool:
    """Whether `pos` is one scheme for all layers, whose options are flat."""
    return isinstance(pos, str) and "+" not in pos


def short(name: str) -> str:
    """A scheme's name in options and parameters: that of the class where it is from a file outside."""
    return name.rpartition(":")[2]


def label(pos: str | list[str]) -> str:
    """How tables and figures name it: rope, rope+alibi, "rope, rope, none"."""
    return ", ".join("+".join(map(short, names)) for names in pattern(pos))


def scheme_class(name: str) -> type[Scheme]:
    """The class of a scheme's name, or of my_file.py:MyScheme. ValueError where there is none."""
    if name in SCHEMES:
        return SCHEMES[name]
    path, _, own = name.rpartition(":")
    if not path and name.endswith(".py"):
        raise ValueError(f"pos {name} names a file alone: give the class too, {name}:MyScheme")
    if not path:
        raise ValueError(f"pos {name!r} is no scheme{nearest(name, SCHEMES)} (schemes: {', '.join(SCHEMES)})")
    content = vars(module_of(Path(path).resolve()))
    classes = [k for k, c in content.items() if isinstance(c, type) and issubclass(c, Scheme) and c is not Scheme]
    if own not in classes:
        raise ValueError(f"{path} has no scheme {own!r}{nearest(own, classes)} (schemes there: {', '.join(classes)})")
    return content[own]


@functools.cache
def module_of(path: Path):
    """A Python file outside of this folder as a module. ValueError where it cannot be loaded."""
    if not path.is_file():
        raise ValueError(f"pos names {path}, which is not there: give a file relative to the working directory")
    name = f"scheme_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"pos names {path}, which is no Python file: give my_file.py:MyScheme")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # so that models can be pickled
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    return module


def sources(pos: str | list[str]) -> list[Path]:
    """The files that the schemes of `pos` are made of, those of their base classes and of the schemes that these files
    import included."""
    files = {Path(inspect.getfile(Scheme)), *Path(__file__).parent.glob("_*.py")}
    for name in names_in(pos):
        for kind in (c for c in scheme_class(name).__mro__ if issubclass(c, Scheme)):
            used = [
                c for c in vars(sys.modules[kind.__module__]).values() if inspect.isclass(c) and issubclass(c, Scheme)
            ]
            files |= {Path(inspect.getfile(c)) for c in (kind, *used)}
    return sorted(path.resolve() for path in files)


def outside_sources(pos: str | list[str]) -> str | None:
    """Hex digest of those sources of `pos` that are not of this package; None where there are none."""
    here = Path(__file__).parent.resolve()
    files = [path for path in sources(pos) if path.parent != here]
    return hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()[:16] if files else None


# ---- options


def options_of(cls: type[Scheme]) -> dict[str, tuple]:
    """Option → (annotation, default): the keyword-only arguments of the class."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    types = get_type_hints(cls.__init__)
    return {p.name: (types.get(p.name), p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def fits(value, annotation) -> bool:
    """Whether an option's value has the type that the scheme's signature announces."""
    if annotation is None:
        return True
    if get_origin(annotation) is Literal:
        return any(value == valid and type(value) is type(valid) for valid in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):  # X | None
        return any(fits(value, part) for part in get_args(annotation))
    if get_origin(annotation):  # list[float]
        return isinstance(value, get_origin(annotation))
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    if annotation is type(None):
        return value is None
    return type(value) is annotation


def announced(annotation) -> str:
    """An option's type as messages have it: "float or null", "(2, 4, 8)"."""
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        return str(values) if len(values) > 1 else repr(values[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(announced, get_args(annotation)))
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))


def problems_of(pos: str | list[str], options: dict) -> list[str]:
    """What is wrong with `pos` and its options, a sentence each."""
    entries = [pos] if isinstance(pos, str) else pos
    if not pos or not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return [f"pos must be a scheme's name or a list of them, not {pos!r}"]
    names = names_in(pos)
    try:
        for name in names:
            scheme_class(name)
    except ValueError as error:
        return [str(error)]
    for entry in [*pattern(pos), names]:
        if len({*map(short, entry)}) < len(entry):
            return [f"pos {label(pos)} has two schemes of one name in {', '.join(entry)}"]
    if not isinstance(options, dict):
        return []
    if single(pos):
        return problems_of_options(names[0], options, "pos_options")
    by_name, found = {short(name): name for name in names}, []
    for key, own in options.items():
        if key not in by_name:
            example = f"{{{next(iter(by_name))}: {{…}}}}"
            found.append(
                f"pos_options: {key!r} is no scheme of pos {label(pos)}{nearest(key, by_name)}; options of several "
                f"schemes go by name, such as {example}"
            )
        elif not isinstance(own, dict):
            found.append(f"pos_options: {key} must be a mapping of option to value, not {own!r}")
        else:
            found += problems_of_options(by_name[key], own, f"pos_options of {key}")
    return found


def problems_of_options(name: str, given: dict, where: str) -> list[str]:
    known, found = options_of(scheme_class(name)), []
    for option, value in given.items():
        if option not in known:
            valid = f"{short(name)} takes {', '.join(known) or 'no options'}"
            found.append(f"{where}: unknown option {option!r}{nearest(option, known)} ({valid})")
        elif not fits(value, known[option][0]):
            expected = announced(known[option][0])
            found.append(f"{where}: {option} of {short(name)} cannot be {value!r}; expected {expected}")
    for option, (_, default) in known.items():
        if default is inspect.Parameter.empty and option not in given:
            found.append(f"{where}: {short(name)} needs a value of {option}, which has no default")
    return found


def complete_options(config) -> dict:
    """The options of a config's `pos`, every one written out."""

    def complete(name: str, given: dict) -> dict:
        cls = scheme_class(name)
        return cls.complete_options({**{k: default for k, (_, default) in options_of(cls).items()}, **given}, config)

    if single(config.pos):
        return complete(names_in(config.pos)[0], config.pos_options)
    return {short(name): complete(name, config.pos_options.get(short(name), {})) for name in names_in(config.pos)}


# ---- one layer's scheme


def make(config, layer: int) -> Scheme:
    """The scheme of a layer, of a config with all options written out."""
    names = layer_schemes(config.pos, layer)
    options = {short(names[0]): config.pos_options} if single(config.pos) else config.pos_options
    parts = {short(name): build(name, config, layer, options[short(name)]) for name in names}
    return Combined(config, layer, parts) if len(parts) > 1 else next(iter(parts.values()))


def build(name: str, config, layer: int, options: dict) -> Scheme:
    """One scheme of a layer. ValueError also for other errors of a class from outside, which is no one's crash."""
    try:
        return scheme_class(name)(config, layer, **options)
    except ValueError:
        raise
    except Exception as error:
        if name in SCHEMES:
            raise
        raise ValueError(f"{name} cannot be built: {type(error).__name__}: {first_line(error)}") from error


def share(layers: list[Scheme]) -> None:
    """Give every layer the first one's modules that its scheme shares. A scheme is in several layers by its name."""
    first = {}
    for scheme in (scheme for layer in layers for scheme in layer.parts()):
        for name in scheme.shared:
            setattr(scheme, name, first.setdefault((scheme.name, name), getattr(scheme, name)))


def layer_schemes(pos: str | list[str], layer: int) -> tuple[str, ...]:
    """Names of a layer's schemes."""
    entries = pattern(pos)
    return tuple(entries[layer % len(entries)])
