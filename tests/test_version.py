import subprocess

import pytest

from fishertune_d2 import version


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, as if the package lay in it."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(version, "_CHECKOUT", tmp_path)
    return tmp_path


def test_the_commit_is_marked_where_files_differ_from_it(checkout):
    clean = version.commit()
    log = subprocess.run(
        ["git", "log", "--format=%H"], cwd=checkout, capture_output=True, text=True
    )
    assert len(clean) == 12 and log.stdout.startswith(clean)
    (checkout / "file").write_text("2")
    assert version.commit() == f"{clean}-dirty"


def test_the_repository_that_an_installed_package_lies_in_is_not_its_checkout(
    checkout, monkeypatch
):
    (checkout / "site-packages").mkdir()
    monkeypatch.setattr(version, "_CHECKOUT", checkout / "site-packages")
    assert version.commit() is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert version.commit() is None
