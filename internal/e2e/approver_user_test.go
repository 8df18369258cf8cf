package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	approvals "cal/approval/client"
	"cal/internal/testenv"
	"cal/nucleus"
)

// approver is another user of the host, whose the authority is.
const approver = 54322

// TestApprovalsOfAnotherUser follows doc/approvals.md: the authority is another user's, the person
// may ask it and cannot decide, and what requires that is refused where it is not so.
func TestApprovalsOfAnotherUser(t *testing.T) {
	if !isRoot() {
		t.Skip("only root may become another user")
	}
	e := testenv.New(t)
	bin := filepath.Join(e.Dir, "bin") // the built ones may lie where others cannot walk
	if out, err := exec.Command("cp", "-r", e.Bin, bin).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	e.Bin = bin
	e.Vars["PATH"] = "/usr/local/bin:/usr/bin:/bin"
	if err := os.Chmod(e.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	theirs := filepath.Join(e.Dir, "approver")
	person := &syscall.Credential{Uid: ordinary, Gid: ordinary}
	e.Credential = person
	e.Own()
	for _, dir := range []string{theirs, filepath.Join(theirs, "run")} {
		if err := os.Mkdir(dir, 0o711); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, approver, approver); err != nil {
			t.Fatal(err)
		}
	}
	if r := e.Cal("doctor"); r.Code != 0 {
		t.Skipf("no machine can be started by an ordinary user here\n%v", r)
	}

	makeKey := func(cmd *exec.Cmd) {
		t.Helper()
		init := e.Terminal(cmd)
		for _, talk := range [][2]string{{"passphrase: ", testenv.Passphrase}, {"passphrase again: ", testenv.Passphrase}, {"your phrase: ", "red lamp"}} {
			init.Until(talk[0])
			init.Type(talk[1] + "\n")
		}
		if code := init.Wait(); code != 0 {
			t.Fatalf("init: %d\n%s", code, init.Screen)
		}
	}

	// Nobody can approve, then the person alone: refused, with what to do.
	e.Cal("run", "--require-approvals", "other-user", "--yes", "--", "true").Want(t, 1, "no authority answers")
	e.Cal("run", "--require-approvals", "anybody", "--yes", "--", "true").Want(t, 2, `want "other-user"`)
	makeKey(e.Command("cal", "approve", "init", "--approver", "me")) // users without a name have to say one
	e.Cal("node", "restart").Want(t, 0)
	e.Cal("run", "--require-approvals", "other-user", "--yes", "--", "true").Want(t, 1, "approvals of another user are required", "doc/approvals.md")
	e.Cal("run", "--yes", "--", "true").Want(t, 0) // without the requirement
	e.Cal("node", "stop").Want(t, 0)
	if err := syscall.Kill(authorityPID(t, e), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"authority", "run/authority.sock"} {
		if err := os.RemoveAll(filepath.Join(e.CAL, name)); err != nil {
			t.Fatal(err)
		}
	}

	// The authority of another user, at the person's socket by a link.
	socket := filepath.Join(theirs, "run", "authority.sock")
	as := func(args ...string) *exec.Cmd {
		e.Credential = &syscall.Credential{Uid: approver, Gid: approver}
		cmd := e.Lines("nucleus-authority", append(args, "--dir", filepath.Join(theirs, "authority"), "--socket", socket)...)
		cmd.Dir = theirs
		e.Credential = person
		return cmd
	}
	makeKey(as("init", "--approver", "ada"))
	serve := e.Start(as("serve", "--ask-uid", "54321"))
	serve.Until("approver ada at ")
	if err := os.Symlink(socket, filepath.Join(e.CAL, "run", "authority.sock")); err != nil {
		t.Fatal(err)
	}
	e.Cal("node", "start").Want(t, 0)
	e.Cal("run", "--require-approvals", "other-user", "--", "true").Want(t, 0)
	e.Cal("run", "--require-approvals", "other-user:54322", "--", "true").Want(t, 0)
	e.Cal("run", "--require-approvals", "other-user:54323", "--", "true").Want(t, 1, "approvals of uid 54323 are required")

	// What the person's programs can do: ask and read, and not decide.
	s := &grantStory{t: t, e: e, node: e.Client()}
	pod, err := s.node.CreatePod(e.Context(), nucleus.PodSpec{Mode: nucleus.Mediated, Image: nucleus.Image{Kind: "host"}, Approvals: approvals.RequireOtherUser,
		Policy: []byte(`{"operations":{"write_files":"ask","read_files":"always"}}`)})
	if err != nil {
		t.Fatal(err)
	}
	s.pod = pod.ID
	ask := s.asks(s.write("a"))
	e.Cal("approve", "list").Want(t, 0, ask)
	e.Cal("approve", "deny", ask).Want(t, 1, "uid 54321 may not do this")
	e.Cal("approve", "revoke", ask).Want(t, 1, "uid 54321 may not do this")
	if out, err := exec.Command("cat", filepath.Join(theirs, "authority", "approvers", "ada.json")).Output(); err != nil || len(out) == 0 {
		t.Errorf("positive control: %v", err)
	}
	e.Credential = person
	if r := e.Start(e.Command("cat", filepath.Join(theirs, "authority", "approvers", "ada.json"))).Wait(); r.Code == 0 {
		t.Errorf("the person reads the key: %v", r)
	}
	grant := e.Terminal(as("grant", ask))
	grant.Until("[y/N]")
	grant.Type("y\n")
	grant.Until("your phrase: red lamp")
	grant.Until("passphrase of ada")
	grant.Type(testenv.Passphrase + "\n")
	if code := grant.Wait(); code != 0 {
		t.Fatalf("grant: %d\n%s", code, grant.Screen)
	}
	if e := s.write("a"); e != nil {
		t.Errorf("after the other user's grant: %+v", e)
	}
	e.Cal("approve", "approver", "list").Want(t, 0, "ada")
	// Her log is held against theirs, which she cannot read on the disk.
	e.Cal("audit", "verify").Want(t, 0, "the authority's log, from", "each grant that was used is in the authority's log")

	// An authority of the person's own in its place is none.
	e.Cal("node", "stop").Want(t, 0)
	if err := os.Remove(filepath.Join(e.CAL, "run", "authority.sock")); err != nil {
		t.Fatal(err)
	}
	makeKey(e.Command("cal", "approve", "init", "--approver", "me"))
	e.Cal("node", "start").Want(t, 0)
	s.node = e.Client()
	if e := s.write("b"); e == nil || !strings.Contains(e.Message, "uid 54321's like this node") {
		t.Errorf("a machine that requires another user asks the person's own: %+v", e)
	}
	e.Cal("run", "--yes", "--", "true").Want(t, 0) // nothing is required of all
	e.Write(filepath.Join(e.CAL, "config.yaml"), "approvals: {require: other-user}\n")
	e.Cal("run", "--yes", "--", "true").Want(t, 1, "cal node restart") // of a node that was started before
	e.Cal("node", "restart").Want(t, 0)
	e.Cal("run", "--yes", "--", "true").Want(t, 1, "approvals of another user are required")
}
