"""Values of a quantization_config, read strictly: another one than those known is refused, never guessed around."""

from collections.abc import Mapping

from moe_ref.contract.errors import raise_faults

Config = Mapping[str, object]


def check_values(where: str, config: Config, **allowed: tuple[object, ...]) -> None:
    """Raise UsageValueError that lists every key whose value is not one of those allowed; None stands for no key."""
    raise_faults(where, [f"{key}={config.get(key)!r}, but should be {' or '.join(map(repr, values))}"
                         for key, values in allowed.items() if not _is_one(config.get(key), values)])


def _is_one(value: object, values: tuple[object, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in values)


def strings(where: str, config: Config, key: str) -> list[str]:
    """A list of strings, or the keys of a mapping; empty where the key is not there or null."""
    held = config.get(key)
    listed = list(held) if isinstance(held, list | dict) else [] if held is None else [held]
    if not isinstance(held, list | dict | None) or not all(isinstance(one, str) for one in listed):
        raise_faults(where, [f"{key}={held!r}, but should be a list of strings"])
    return [str(one) for one in listed]
