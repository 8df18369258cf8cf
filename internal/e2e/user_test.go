package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cal/internal/testenv"
	"cal/internal/testenv/subids"
)

// ordinary is a user without a name, subordinate ids or rights.
const ordinary = 54321

// TestOrdinaryUser takes the main path as somebody who is not root.
func TestOrdinaryUser(t *testing.T) {
	if !isRoot() {
		t.Skip("every other test here runs as an ordinary user already")
	}
	e := testenv.New(t)
	mainPath(t, e, "0")
	e.Cal("doctor").Want(t, 0, "machines have one user id", "sudo usermod --add-subuids")
}

// TestSubordinateIDs takes it as somebody who has subordinate ids: in the
// machine tools and agent are users of their own then, and the workspace is removed
// under the map under which it was made.
func TestSubordinateIDs(t *testing.T) {
	if !isRoot() {
		t.Skip("only root may become another user")
	}
	e := testenv.New(t)
	as, err := subids.As(e.Dir, ordinary, firstSubID, firstSubID)
	if err != nil {
		t.Skipf("no subordinate ids on this host: %v", err)
	}
	e.As = as
	mainPath(t, e, "1000")
	if r := e.Cal("doctor").Want(t, 0); strings.Contains(r.Stdout, "one user id") {
		t.Errorf("ids are there and not used\n%v", r)
	}
	files := filepath.Join(e.CAL, "isolation", "vms", "greeter", "files")
	if owner := ownerOf(t, files); owner < firstSubID || owner >= firstSubID+65536 {
		t.Errorf("the workspace belongs to %d", owner)
	}
	e.Cal("run", "--repo", filepath.Join(e.Dir, "greeter"), "--", "sh", "-c", "mkdir -m 0 closed").Want(t, 0)
	e.Cal("vm", "delete", "--yes", "greeter").Want(t, 0)
	if _, err := os.Stat(filepath.Dir(files)); !os.IsNotExist(err) {
		t.Errorf("the workspace is left: %v", err)
	}
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

const firstSubID = 500000

func ownerOf(t *testing.T, path string) uint32 {
	t.Helper()
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Uid
}

// asOrdinary has all commands run as a user without rights, who owns what is there.
func asOrdinary(t *testing.T, e *testenv.Env) {
	t.Helper()
	e.Credential = &syscall.Credential{Uid: ordinary, Gid: ordinary}
	bin := filepath.Join(e.Dir, "bin") // the built ones may lie where others cannot walk
	if out, err := exec.Command("cp", "-r", e.Bin, bin).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	e.Bin = bin
	if err := os.Chmod(e.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	e.Own()
}

// mainPath is what a person does first, as the user ordinary; tools is the id of the
// tools in a machine of that user's.
func mainPath(t *testing.T, e *testenv.Env, tools string) {
	t.Helper()
	asOrdinary(t, e)
	e.Vars["PATH"] = "/usr/local/bin:/usr/bin:/bin"
	repo := e.Repo("greeter", greeter())
	if r := e.Cal("doctor"); r.Code != 0 {
		t.Skipf("no machine can be started by an ordinary user here\n%v", r)
	}
	if r := e.Cal("run", "--", "id", "-u"); strings.TrimSpace(r.Stdout) != tools {
		t.Errorf("the tools' user is not %s\n%v", tools, r)
	}
	host := plantHost(t, e, repo)
	e.Own()
	run := e.Cal("run", "--repo", repo.Dir, "--", "sh", "-c", "sh test.sh; sed -i s/Helo/Hello/ greet.sh && sh test.sh && git status --short && touch /usr/made; cat /etc/shadow; echo > /home/agent/scratch; ls -l /home/agent")
	run.Want(t, 0, "FAILED", "PASSED", "M greet.sh", "scratch")
	if _, err := os.Stat("/usr/made"); err == nil {
		t.Error("the machine wrote to the host's /usr")
	}
	if strings.Contains(run.Stdout, "root:") {
		t.Errorf("the host's passwords\n%v", run)
	}
	search := e.Cal("run", "--repo", repo.Dir, "--", "bash", "-c", "printf 'canary-%s-1' planted > /home/agent/planted\n"+host.search()).Want(t, 0, "search-ended", "canary-planted-1")
	if where := host.found([]byte(search.Stdout)); len(where) > 0 {
		t.Errorf("found in the machine: %v", where)
	}
	if err := os.Remove(filepath.Join(repo.Dir, "notes.local")); err != nil { // the tree is clean again
		t.Fatal(err)
	}
	e.Cal("repo", "apply", "--repo", repo.Dir).Want(t, 0, "greet.sh")
	e.Verify()
}

// TestWithoutNamespaces starts CAL where nobody may make a user namespace: a limit of
// this test's own namespace, so that the host's stays as it is.
func TestWithoutNamespaces(t *testing.T) {
	if !isRoot() {
		t.Skip("only root may become another user in a namespace of its own")
	}
	e := testenv.New(t)
	asOrdinary(t, e)
	within := func(limit string) {
		e.As = []string{"setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", "unshare", "--user", "--map-user=54321", "--map-group=54321", "--keep-caps", "sh", "-c",
			`echo ` + limit + ` >/proc/sys/user/max_user_namespaces && exec setpriv --inh-caps=-all --ambient-caps=-all -- "$@"`, "sh"}
	}
	defer func() { e.As = nil }()
	within("100")
	if r := e.Cal("doctor"); r.Code != 0 { // control
		t.Skipf("no machine can be started in a user namespace here\n%v", r)
	}
	within("0")
	e.Cal("doctor").Want(t, 1, "max_user_namespaces is 0", "sudo sysctl -w user.max_user_namespaces=")
	r := e.Cal("run", "--", "true").Want(t, 1, "max_user_namespaces is 0")
	if got := lines(r.Stderr); len(got) > 3 {
		t.Errorf("%d lines, want a fact and a hint\n%v", len(got), r)
	}
	if left := e.LeftOfMachines(); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}
