"""`rlrc study` with files and policies that are not there."""


def test_the_command_refuses_what_is_not_there(refused, tmp_path):
    line = refused("study", "tabeltop", "--out", tmp_path / "out")
    assert "tabeltop: no such file, and not among tabletop, tabletop-recovered, tiny" in line
    line = refused("study", "tiny", "--policy", "nowhere", "--out", tmp_path / "out")
    assert "nowhere: no such bundle directory" in line
    assert not (tmp_path / "out").exists()
