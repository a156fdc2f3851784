from dataclasses import replace

from rlrc_ros.cli.main import main
from rlrc_ros.profile import CameraSource, load_profile
from rlrc_ros.rollouts.profile_topics import profile_topics
from rlrc_ros.rollouts.verify import differences_to_profile, verify
from tests.rollouts.bags import IMAGE, POSE, record, robot_bag

PROFILE = load_profile("sim")


def differences(bag, profile=PROFILE):
    return differences_to_profile(profile, verify(bag))


def test_a_profile_has_topics_with_types_and_limits():
    topics = {topic.topic: topic for topic in profile_topics(PROFILE)}
    assert topics["camera/front/image_raw"][1:] == ("cameras.front", IMAGE, 0.2, 10.0)
    assert topics["ee_pose"].type == POSE and topics["ee_command"].type == ""
    compressed = replace(PROFILE, cameras={"front": CameraSource(topic="/x", compressed=True)})
    assert profile_topics(compressed)[0].type == "sensor_msgs/msg/CompressedImage"


def test_a_gripper_behind_an_action_has_no_topic():
    by_action = replace(PROFILE, simulated=False, gripper_command_type="action")
    roles = [topic.role for topic in profile_topics(PROFILE)]
    assert [topic.role for topic in profile_topics(by_action)] == roles[:-1]
    assert roles[-1] == "gripper_command"


def test_a_bag_with_all_of_the_profile_differs_in_nothing(tmp_path):
    assert differences(robot_bag(tmp_path)) == []


def test_topics_that_are_missing_are_named(tmp_path):
    assert differences(record(tmp_path, ["x"])) == [
        f"{topic} ({role} of the profile) is not in the bag"
        for topic, role in (
            ("/camera/front/image_raw", "cameras.front"),
            *((f"/{name}", name) for name in ("joint_states", "ee_pose", "ee_command")),
            ("/gripper_command", "gripper_command"),
        )
    ]


def test_a_source_slower_than_the_profile_has_it_is_named(tmp_path):
    (line,) = differences(robot_bag(tmp_path, camera=8))
    assert line == (
        "/camera/front/image_raw came at 8.0 Hz; the min_rate of the profile's cameras.front is"
        " 10 Hz"
    )


def test_a_source_silent_for_too_long_for_a_policy_is_named(tmp_path):
    (line,) = differences(robot_bag(tmp_path, stops=1.5))
    assert (
        "/camera/front/image_raw was silent for up to" in line and "cameras.front is 0.2 s" in line
    )


def test_a_source_of_another_type_is_named(tmp_path):
    (line,) = differences(robot_bag(tmp_path, image=POSE))
    assert line == (
        "/camera/front/image_raw is a geometry_msgs/msg/PoseStamped; the profile's cameras.front is"
        " a sensor_msgs/msg/Image"
    )


def test_the_command_checks_a_bag_against_a_profile(tmp_path, capsys):
    bag = record(tmp_path, ["x"] * 20)
    assert main(["bag", "verify", str(bag)]) == 0
    assert main(["bag", "verify", str(bag), "--profile", "sim"]) == 1
    assert "/ee_pose (ee_pose of the profile) is not in the bag" in capsys.readouterr().out
    assert main(["bag", "verify", str(bag), "--profile", "absent"]) == 2
