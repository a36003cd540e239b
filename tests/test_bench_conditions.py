"""What disturbs a measurement, with every source of the system injected."""

from pathlib import Path

import pytest

from openelm_mlx.bench.conditions import disturbances

MACOS_CALM = {
    "pmset -g batt": "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t100%; charged; 0:00 remaining",
    "pmset -g": "Currently in use:\n standby              1\n lowpowermode         0\n",
    "pmset -g therm": "Note: No thermal warning level has been recorded\n CPU_Speed_Limit \t= 100\n",
    "sysctl -n kern.memorystatus_vm_pressure_level": "1\n",
}


def macos(**changed):
    answers = {**MACOS_CALM, **changed}
    return disturbances("darwin", run=lambda command: answers.get(" ".join(command)), load=0.0)


def test_a_calm_mac_has_none():
    assert macos() == []


@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        ("pmset -g batt", "Now drawing from 'Battery Power'", "battery"),
        ("pmset -g", " lowpowermode         1\n", "low-power"),
        ("pmset -g", " powermode            1\n", "low-power"),
        ("pmset -g therm", "CPU_Speed_Limit \t= 62\n", "62 %"),
        ("sysctl -n kern.memorystatus_vm_pressure_level", "4\n", "critical"),
    ],
)
def test_each_disturbance_of_a_mac_is_named(command, answer, said):
    (sentence,) = macos(**{command: answer})
    assert said in sentence


def test_commands_that_fail_are_left_out():
    assert disturbances("darwin", run=lambda command: None, load=0.0) == []


def test_linux_reads_files(tmp_path):
    battery = tmp_path / "sys/class/power_supply/BAT0"
    battery.mkdir(parents=True)
    (battery / "status").write_text("Discharging\n")
    pressure = tmp_path / "proc/pressure"
    pressure.mkdir(parents=True)
    (pressure / "memory").write_text("some avg10=12.50 avg60=0.00 avg300=0.00 total=1\n")
    sentences = disturbances("linux", root=tmp_path, load=0.0)
    assert len(sentences) == 2
    assert "battery" in sentences[0]
    assert "12.50 %" in sentences[1]
    assert disturbances("linux", root=tmp_path / "nothing", load=0.0) == []


def test_other_work_is_named():
    (sentence,) = disturbances("linux", root=Path("/nowhere"), load=2.0)
    assert "2.0 for each core" in sentence
