"""Arguments: flags override the file, and whatever is unknown, mistyped or out of range is named at once."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from baton.arguments import StageArguments, build_config, option, parse, parse_with_rest
from baton.errors import InputError
from baton.task import task_of


class Arguments(StageArguments):
    model_name_or_path: str = option(..., "the policy", changes_result=False)
    K: int = option(8, "responses per prompt", ge=1)
    temperature: float | None = option(1.0, "of sampling", gt=0)
    ports: list[int] = option([8000], "of the servers")
    choose_type: Literal["random", "max_min"] = option("max_min", "which pairs: 100 % of them")
    shuffle: bool = option(True, "whether to shuffle")
    output_dir: Path = option(Path("out"), "where to", changes_result=False)
    api_key: SecretStr = option(SecretStr(""), "of the server")


MODEL = ("--model_name_or_path", "m")


def read(*argv: str) -> Arguments:
    return parse(Arguments, "A stage.", argv)


@dataclasses.dataclass
class TrainerConfig:
    beta: float = dataclasses.field(default=0.1, metadata={"help": "of the loss, 100 %"})
    loss_type: list[str] = dataclasses.field(default_factory=lambda: ["sigmoid"])
    bf16: bool | None = None
    max_steps: int = -1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.label_smoothing >= 0.5:
            raise ValueError("label_smoothing must be below 0.5")


def test_defaults_hold_where_nothing_is_given():
    arguments = read(*MODEL)
    assert (arguments.K, arguments.temperature, arguments.ports) == (8, 1.0, [8000])
    assert (arguments.shuffle, arguments.overwrite) == (True, False)


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: m\nK: 4\ntemperature: 5e-1\nports: [1, 2]\nshuffle: false\n")
    arguments = read(str(config), "--K", "2", "--ports", "7", "8", "9")
    assert (arguments.K, arguments.temperature, arguments.ports) == (2, 0.5, [7, 8, 9])
    assert arguments.shuffle is False


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--shuffle",), True),
        (("--shuffle", "false"), False),
        (("--shuffle=false",), False),
        (("--shuffle", "True"), True),
        (("--shuffle", "0"), False),
        ((), True),
    ],
)
def test_a_bool_is_a_flag_with_or_without_a_value(flags, expected):
    assert read(*MODEL, *flags).shuffle is expected


@given(st.integers(1), st.floats(0, exclude_min=True, allow_infinity=False), st.lists(st.integers(), min_size=1))
def test_every_value_comes_through_flags_as_it_was(count, temperature, ports):
    flags = ("--K", str(count), "--temperature", repr(temperature), "--ports", *map(str, ports))
    arguments = read(*MODEL, *flags)
    assert (arguments.K, arguments.temperature, arguments.ports) == (count, temperature, ports)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temprature", "1"), "unknown setting `temprature`: did you mean `temperature`?"),
        (("--zzz", "1"), "unknown setting `zzz`: --help lists all"),
        (("--temp", "1"), "unknown setting `temp`"),
        (("--K", "many"), "`K`: input should be a valid integer"),
        (("--K", "2.5"), "`K`: input should be a valid integer"),
        (("--K", "0"), "`K`: input should be greater than or equal to 1, got '0'"),
        (("--K",), "expected one argument"),
        (("--temperature", "0"), "`temperature`: input should be greater than 0"),
        (("--temperature", "nan"), "`temperature`: input should be greater than 0"),
        (("--ports", "1", "x"), "`ports`: input should be a valid integer"),
        (("--choose_type", "best"), "`choose_type`: input should be 'random' or 'max_min', got 'best'"),
        (("--shuffle", "perhaps"), "`shuffle`: input should be a valid boolean"),
        (("--overwrite", "--K", "1", "stray"), "unexpected argument `stray`"),
    ],
)
def test_a_bad_flag_is_named_with_what_would_be_right(flags, message):
    with pytest.raises(InputError) as error:
        read(*MODEL, *flags)
    assert message in str(error.value)


def test_a_missing_setting_says_how_to_give_it():
    with pytest.raises(InputError, match="`model_name_or_path` is required: give --model_name_or_path"):
        read("--K", "2")


def test_all_bad_values_are_named_together():
    with pytest.raises(InputError) as error:
        read("--K", "0", "--temperature", "-1")
    assert all(f"`{name}`" in str(error.value) for name in ("model_name_or_path", "K", "temperature"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"kay: 4\n", "unknown setting `kay`"),
        (b"K: [1\n", "not YAML"),
        (b"- K\n", "expected a mapping of settings by name"),
        (b"5: 6\n", "expected a mapping of settings by name"),
        (b"", "expected a mapping of settings by name"),
        (b"K: \xff\n", "cannot be read"),
        (b"K: !!python/object/apply:os.getcwd []\n", "not YAML"),
        (b"model_name_or_path: m\nports: 8000\n", "`ports`: input should be a valid list"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(str(config))
    assert message in str(error.value) and str(error.value).startswith(str(config))


def test_what_a_flag_overrides_is_not_laid_to_the_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: m\nK: 2\n")
    with pytest.raises(InputError, match=r"^`K`: input should be"):
        read(str(config), "--K", "0")
    with pytest.raises(InputError, match=r"^unknown setting `zzz`"):
        read(str(config), "--zzz", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('K: 1\nhub_token: "hf_HUSH', ":2:20: not YAML: found unexpected end of stream"),
        ("hub_token: hf_HUSH: x", ":1:19: not YAML: mapping values are not allowed here"),
        ("hub_token: *HUSH", ":1:12: not YAML: found undefined alias"),
        ("hub_token: !HUSH 1", ":1:12: not YAML: could not determine a constructor for the tag"),
        ("hub_token: !!int HUSH", ": not YAML: a character or a value that is not allowed"),
        ("K: @1", ":1:4: not YAML: found character '@' that cannot start any token"),
    ],
)
def test_a_file_that_is_no_yaml_is_named_with_the_place_and_none_of_its_text(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read(str(tmp_path / "config.yaml"))
    assert str(error.value) == f"{tmp_path / 'config.yaml'}{message}"


def test_an_absent_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml: no such file"):
        read("absent.yaml")
    with pytest.raises(InputError, match=r"config/training\.yaml: no such file .*did you mean configs/training\.yaml\?"):
        read("./config/training.yaml")
    with pytest.raises(InputError, match=r"a folder, and the first argument without a flag is the YAML file"):
        read(str(tmp_path))


def test_help_gives_every_flag_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as done:
        read("--help")
    text = capsys.readouterr().out
    assert done.value.code == 0
    for name, field in Arguments.model_fields.items():
        assert f"--{name}" in text
        assert " ".join(field.description.split()) in " ".join(text.split())
    assert "[default: 8]" in text
    assert "[required]" in text
    assert "{random,max_min}" in text


def test_what_changes_the_result_is_told_from_what_does_not_and_no_secret_is_kept():
    arguments = read(*MODEL, "--api_key", "hunter2", "--output_dir", "elsewhere")
    kept = task_of("test", arguments, {})
    assert set(kept["arguments"]) == {"K", "temperature", "ports", "choose_type", "shuffle"}
    assert kept["execution"]["output_dir"] == "elsewhere"
    assert "hunter2" not in json.dumps(kept) + repr(arguments)
    assert arguments.api_key.get_secret_value() == "hunter2"


def test_settings_of_a_trainer_are_passed_on_and_become_its_types(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: m\nbeta: 5e-1\nmax_steps: 3\n")
    flags = ("--max_steps", "20", "--bf16", "--loss_type", "sigmoid", "sft", "--K", "2")
    arguments, rest = parse_with_rest(Arguments, "A stage.", lambda: TrainerConfig, [str(config), *flags])
    assert arguments.K == 2
    expected = TrainerConfig(beta=0.5, loss_type=["sigmoid", "sft"], bf16=True, max_steps=20)
    assert build_config(TrainerConfig, rest) == expected


def test_a_single_value_is_a_list_of_one_where_a_trainer_wants_a_list():
    assert build_config(TrainerConfig, {"loss_type": "ipo"}).loss_type == ["ipo"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betta": 1}, "unknown setting `betta`: did you mean `beta`?"),
        ({"chose_type": 1}, "unknown setting `chose_type`: did you mean `choose_type`?"),
        ({"beta": "high"}, "`beta`: input should be a valid number"),
        ({"label_smoothing": "0.7"}, "TrainerConfig: label_smoothing must be below 0.5"),
    ],
)
def test_a_bad_setting_of_a_trainer_is_named(settings, message):
    with pytest.raises(InputError) as error:
        build_config(TrainerConfig, settings, Arguments.model_fields)
    assert message in str(error.value)


def test_help_lists_the_settings_of_the_trainer_too(capsys):
    with pytest.raises(SystemExit):
        parse_with_rest(Arguments, "A stage.", lambda: TrainerConfig, ["--help"])
    text = capsys.readouterr().out
    assert "--label_smoothing" in text
    assert "of the loss, 100 % [default: 0.1]" in text
