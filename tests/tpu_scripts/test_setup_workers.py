"""tpu_scripts/setup_workers.sh: this clone, at one revision, on every worker."""

from __future__ import annotations

from tests.tpu_scripts.conftest import Cloud, git


def test_a_dry_run_prints_every_command_and_runs_none(cloud: Cloud) -> None:
    clone = cloud.use_own_clone()
    commit = git(clone, "rev-parse", "HEAD")
    cloud.slices = 2
    cloud.variables["SSH_FLAGS"] = "--internal-ip"
    done = cloud.run("setup_workers.sh", "--dry-run")
    assert done.returncode == 0, done.stderr
    bundle = f"{clone}/.git/jaxgrpo.bundle"
    where = "--project=my-project --zone=us-east5-b --internal-ip --quiet --worker=all"
    unpack = (
        "git init --quiet jaxgrpo && git -C jaxgrpo fetch --quiet ~/jaxgrpo.bundle "
        "refs/jaxgrpo/setup && git -C jaxgrpo checkout --quiet --force --detach FETCH_HEAD && "
        "jaxgrpo/tpu_scripts/setup.sh"
    )
    ssh = rf"'--command=bash -c '\''{unpack}'\'''"
    assert done.stdout.splitlines() == [
        f"git -C {clone} update-ref refs/jaxgrpo/setup {commit}",
        f"git -C {clone} bundle create --quiet {bundle} refs/jaxgrpo/setup",
        f"gcloud compute tpus tpu-vm scp {bundle} pod-0:jaxgrpo.bundle {where}",
        f"gcloud compute tpus tpu-vm ssh pod-0 {where} {ssh}",
        f"gcloud compute tpus tpu-vm scp {bundle} pod-1:jaxgrpo.bundle {where}",
        f"gcloud compute tpus tpu-vm ssh pod-1 {where} {ssh}",
    ]
    assert cloud.calls == []


def test_every_worker_gets_the_revision_also_a_second_one(cloud: Cloud) -> None:
    clone = cloud.use_own_clone()
    cloud.slices, cloud.hosts = 2, 2
    homes = [cloud.home(index, worker) for index in (0, 1) for worker in (0, 1)]
    for home in homes:
        home.mkdir()
    assert cloud.run("setup_workers.sh").returncode == 0
    first = git(clone, "rev-parse", "HEAD")
    (clone / "new.txt").write_text("new")
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "--message=second")
    second = git(clone, "rev-parse", "HEAD")
    for revision, commit in (("HEAD", second), (first, first)):
        cloud.variables["REVISION"] = revision
        done = cloud.run("setup_workers.sh")
        assert done.returncode == 0, done.stderr
        assert f"{commit} is set up on all workers" in done.stdout
        for home in homes:
            assert git(home / "jaxgrpo", "rev-parse", "HEAD") == commit
            assert (home / "jaxgrpo" / "new.txt").exists() == (commit == second)
    for home in homes:
        assert len((home / "set-up").read_text().splitlines()) == 3


def test_what_is_not_committed_is_pointed_out_and_an_unknown_revision_refused(
    cloud: Cloud,
) -> None:
    clone = cloud.use_own_clone()
    (clone / "tpu_scripts" / "setup.sh").write_text("changed")
    done = cloud.run("setup_workers.sh", "--dry-run")
    assert "changes that are not committed stay here" in done.stderr
    cloud.variables["REVISION"] = "no-such-branch"
    done = cloud.run("setup_workers.sh")
    assert done.returncode == 2
    assert f"REVISION no-such-branch is no revision of {clone}" in done.stderr
