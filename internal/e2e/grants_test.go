package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/approval"
	approvals "cal/approval/client"
	"cal/authority"
	"cal/internal/testenv"
	"cal/node/client"
	"cal/nucleus"
)

// grantStory is one pod's gated requests, and the persons who decide.
type grantStory struct {
	t         *testing.T
	e         *testenv.Env
	node      *client.Client
	authority *approvals.Client
	pod       string
}

const bobsSecret = "an own secret of bob"

func newGrantStory(t *testing.T, e *testenv.Env, policy string) *grantStory {
	t.Helper()
	e.Cal("node", "start").Want(t, 0)
	s := &grantStory{t: t, e: e, node: e.Client(), authority: approvals.New(filepath.Join(e.CAL, "run", "authority.sock"))}
	t.Cleanup(s.authority.Close)
	s.start(policy)
	return s
}

func (s *grantStory) start(policy string) {
	s.t.Helper()
	pod, err := s.node.CreatePod(s.e.Context(), nucleus.PodSpec{Mode: nucleus.Mediated, Image: nucleus.Image{Kind: "host"}, Policy: json.RawMessage(policy)})
	if err != nil {
		s.t.Fatal(err)
	}
	s.pod = pod.ID
}

// write asks for a file to be written, and returns how it was refused.
func (s *grantStory) write(path string) *nucleus.Error {
	_, err := s.node.Tool(s.e.Context(), s.pod, nucleus.WriteFiles, map[string]any{"path": path, "content": "x\n"})
	if err == nil {
		return nil
	}
	return nucleus.AsError(err)
}

func (s *grantStory) asks(e *nucleus.Error) string {
	s.t.Helper()
	if e == nil || e.Kind != nucleus.KindApproval || e.Ask == "" {
		s.t.Fatalf("got %+v, want an ask", e)
	}
	return e.Ask
}

// grant does what the program at the terminal does.
func (s *grantStory) grant(ask, by, passphrase string, task func(nucleus.AskRequest) *nucleus.Task) approvals.Status {
	s.t.Helper()
	shown, _, err := s.authority.Get(s.e.Context(), ask)
	if err != nil {
		s.t.Fatal(err)
	}
	var chosen *nucleus.Task
	if task != nil {
		chosen = task(shown)
	}
	token, err := signer(s.t, s.e, by, passphrase).Grant(shown, chosen, "")
	if err != nil {
		s.t.Fatal(err)
	}
	status, err := s.authority.Grant(s.e.Context(), ask, token)
	if err != nil {
		s.t.Fatal(err)
	}
	return status
}

// signer is an approver's key in clear.
func signer(t *testing.T, e *testenv.Env, name, passphrase string) *authority.Signer {
	t.Helper()
	key, err := authority.ReadKey(filepath.Join(e.CAL, "authority"), name)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := key.Open(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(signer.Close)
	return signer
}

// TestGrants lets two persons approve what needs two, and one choose a task and take it back: with
// the real programs, and a log that both sides tell alike.
func TestGrants(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	e.Cal("node", "start").Want(t, 0)
	const policy = `{"operations":{"write_files":"ask","edit_files":"ask","read_files":"always","run_bash":"ask"},"commands":"any","obligations":{"run_bash":{"approvals":2}}}`
	s := newGrantStory(t, e, policy)
	info, err := s.authority.Info(e.Context())
	if err != nil || len(info.Approvers) != 1 {
		t.Fatalf("info %+v, %v", info, err)
	}
	first := info.Approvers[0].Name
	run := func() *nucleus.Error {
		_, err := s.node.Tool(e.Context(), s.pod, nucleus.RunBash, map[string]any{"argv": []string{"touch", "both"}})
		if err == nil {
			return nil
		}
		return nucleus.AsError(err)
	}
	if e := run(); e == nil || e.Ask != "" || !strings.Contains(e.Message, "approver add") {
		t.Fatalf("two approvals of one person: %+v", e)
	}
	// A second person; the machine that runs does not know it, one that starts then does.
	bob, err := signer(t, e, first, testenv.Passphrase).NewApprover("bob", "red lamp", bobsSecret, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.authority.AddApprover(e.Context(), bob); err != nil {
		t.Fatal(err)
	}
	if e := run(); e == nil || e.Ask != "" {
		t.Fatalf("of a machine that was started before: %+v", e)
	}
	s.start(policy)
	ask := s.asks(run())
	s.grant(ask, first, testenv.Passphrase, nil)
	if e := run(); s.asks(e) != ask || !strings.Contains(e.Message, "2 persons have been asked to approve and 1 have") {
		t.Fatalf("with one grant: %+v", e)
	}
	s.grant(ask, "bob", bobsSecret, nil)
	if e := run(); e != nil {
		t.Fatalf("with both: %+v", e)
	}

	// A task: three files below src, then it asks anew.
	ask = s.asks(s.write("src/a"))
	s.grant(ask, first, testenv.Passphrase, func(shown nucleus.AskRequest) *nucleus.Task {
		return &nucleus.Task{Uses: 3, Until: time.Now().Add(10 * time.Minute).UnixMilli(), Exposure: approval.Told(shown), Match: nucleus.Match{Files: &nucleus.FilesMatch{Root: "src"}}}
	})
	for _, path := range []string{"src/a", "src/b"} {
		if e := s.write(path); e != nil {
			t.Fatalf("%s: %+v", path, e)
		}
	}
	other := s.asks(s.write("elsewhere"))
	e.Cal("approve", "grants").Want(t, 0, ask+"  open", "task, 2 of 3 uses", "use 2 at ")
	began := time.Now()
	e.Cal("approve", "revoke", ask, "--reason", "enough").Want(t, 0, "taken back; nothing of it is open")
	t.Logf("revoke of a task took %v", time.Since(began))
	if again := s.asks(s.write("src/c")); again == ask || again == other {
		t.Errorf("after it was taken back: ask %s", again)
	}
	// The authority is away: what is gated is refused with a hint, the rest goes on.
	if err := syscall.Kill(authorityPID(t, e), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := s.write("src/d"); e == nil || e.Kind != nucleus.KindUnavailable || !strings.Contains(e.Message, "nucleus-authority serve") {
		t.Errorf("without the authority: %+v", e)
	}
	if _, err := s.node.Tool(e.Context(), s.pod, nucleus.ReadFiles, map[string]any{"path": "src/a"}); err != nil {
		t.Errorf("a read without the authority: %v", err)
	}
	e.Cal("node", "start").Want(t, 0)
	e.Cal("approve", "grants", "--all").Want(t, 0, ask+"  revoked")

	if uses := e.Entries(of(nucleus.KindApprovalUse, nucleus.WriteFiles)); len(uses) != 2 {
		t.Errorf("uses %+v", uses)
	}
	if revoked := e.Entries(func(entry nucleus.Entry) bool { return entry.Kind == nucleus.KindApprovalRevoke && entry.Ask == ask }); len(revoked) != 1 {
		t.Errorf("revocations %+v", revoked)
	}
	e.Verify()
	e.Cal("audit", "verify").Want(t, 0)
}

// TestAuthorityThatCannotStart damages the authority's database: what needs an approval is refused,
// with the reason, and the rest goes on.
func TestAuthorityThatCannotStart(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	e.Write(filepath.Join(e.CAL, "authority", "authority.db"), strings.Repeat("not a database. ", 512))
	e.Cal("run", "--", "echo", "works").Want(t, 0, "works", "nobody can approve: the authority ended at once", "authority.db")
	s := newGrantStory(t, e, `{"operations":{"write_files":"ask","read_files":"always"}}`)
	if e := s.write("a"); e == nil || e.Kind != nucleus.KindApproval || !strings.Contains(e.Message, "nobody could approve when this machine started") {
		t.Errorf("got %+v", e)
	}
}

// TestQuorumTask has two persons grant one task, each by the same command at a terminal of their own:
// the second is shown, and signs, the bounds of the first.
func TestQuorumTask(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	const policy = `{"operations":{"write_files":"ask","read_files":"always"},"obligations":{"write_files":{"approvals":2}}}`
	s := newGrantStory(t, e, `{"operations":{"read_files":"always"}}`)
	info, err := s.authority.Info(e.Context())
	if err != nil {
		t.Fatal(err)
	}
	first := info.Approvers[0].Name
	bob, err := signer(t, e, first, testenv.Passphrase).NewApprover("bob", "red lamp", bobsSecret, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.authority.AddApprover(e.Context(), bob); err != nil {
		t.Fatal(err)
	}
	s.start(policy)
	ask := s.asks(s.write("src/a"))
	at := func(who string, flags ...string) *testenv.Terminal {
		return e.Terminal(e.Lines("cal", append([]string{"approve", "grant", ask, "--approver", who, "--match", "src"}, flags...)...))
	}
	grant := func(who, passphrase, says string) {
		t.Helper()
		terminal := at(who, "--uses", "3", "--for", "30m")
		terminal.Until("[y/N]")
		if told := strings.Contains(terminal.Screen.String(), "has granted this ask as a task"); told != (says != "") {
			t.Errorf("%s is told of bounds before: %v\n%s", who, told, terminal.Screen)
		}
		terminal.Type("y\n")
		terminal.Until("grant all of this?")
		terminal.Type("y\n")
		terminal.Until("passphrase of " + who)
		terminal.Type(passphrase + "\n")
		if code := terminal.Wait(); code != 0 || !strings.Contains(terminal.Screen.String(), says) {
			t.Fatalf("%s: exit code %d, want %q\n%s", who, code, says, terminal.Screen)
		}
	}
	grant(first, testenv.Passphrase, "")
	other := at("bob", "--uses", "2")
	if code := other.Wait(); code == 0 || !strings.Contains(other.Screen.String(), "--uses 3") {
		t.Errorf("other bounds: exit code %d\n%s", code, other.Screen)
	}
	if e := s.write("src/a"); s.asks(e) != ask {
		t.Fatalf("with one grant: %+v", e)
	}
	grant("bob", bobsSecret, "granted as a task of 3 uses")
	for _, path := range []string{"src/a", "src/b", "src/c"} {
		if e := s.write(path); e != nil {
			t.Fatalf("%s: %+v", path, e)
		}
	}
	s.asks(s.write("src/d"))
	e.Cal("audit", "verify").Want(t, 0)
}

func authorityPID(t *testing.T, e *testenv.Env) int {
	t.Helper()
	for _, p := range e.Processes() {
		if p.Name == "nucleus-authority" && slices.Contains(p.Args, "serve") {
			return p.PID
		}
	}
	t.Fatal("no authority runs")
	return 0
}

// TestGrantsAcrossKills ends the node, the authority or both with SIGKILL at random moments while an
// approved command runs: each has its effect once or not at all, what came back as done has it, and
// both logs tell the same.
func TestGrantsAcrossKills(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	s := newGrantStory(t, e, `{"operations":{"run_bash":"ask","read_files":"always"},"commands":"any"}`)
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	done := map[int]bool{}
	for i := range rounds {
		run := func() *nucleus.Error {
			_, err := s.node.Tool(e.Context(), s.pod, nucleus.RunBash, map[string]any{"argv": []string{"sh", "-c", fmt.Sprintf("echo effect-%d. >> effects", i)}})
			if err == nil {
				return nil
			}
			return nucleus.AsError(err)
		}
		ask := s.asks(run())
		s.grant(ask, "", testenv.Passphrase, nil)
		ended := make(chan *nucleus.Error, 1)
		go func() { ended <- run() }()
		delay := time.Duration(rand.IntN(20_000)) * time.Microsecond
		time.Sleep(delay) // where it dies is the test's question, not an order
		if i%3 != 1 {
			pid, err := e.NodePID()
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if i%3 != 0 {
			if err := syscall.Kill(authorityPID(t, e), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		failure := <-ended
		done[i] = failure == nil
		t.Logf("round %d: killed after %v: %v", i, delay, failure)
		e.Cal("node", "start").Want(t, 0)
		if i%3 == 1 {
			continue // the node knows the ask still
		}
		if again := run(); again == nil || again.Kind != nucleus.KindApproval || again.Ask == ask {
			t.Errorf("round %d: again: %+v", i, again)
		}
	}
	// After all of that an approval is good: the machine knows its node, its policy and its approvers.
	last := map[string]any{"argv": []string{"sh", "-c", "echo last >> effects"}}
	_, err := s.node.Tool(e.Context(), s.pod, nucleus.RunBash, last)
	s.grant(s.asks(nucleus.AsError(err)), "", testenv.Passphrase, nil)
	if _, err := s.node.Tool(e.Context(), s.pod, nucleus.RunBash, last); err != nil {
		t.Errorf("an approval after the kills: %v", err)
	}
	value, err := s.node.Tool(e.Context(), s.pod, nucleus.ReadFiles, map[string]any{"path": "effects"})
	content := ""
	if err == nil {
		content = string(value)
	}
	for i := range rounds {
		if n := strings.Count(content, fmt.Sprintf("effect-%d.", i)); n > 1 || done[i] && n != 1 {
			t.Errorf("round %d: %d effects, done %v, in %s", i, n, done[i], content)
		}
	}
	e.Verify()
	e.Cal("audit", "verify").Want(t, 0)
}

// TestPassageTakenBack opens a passage and takes it back, then has the authority die while another
// is open: the first is closed when the command returns, the second when the lease has ended.
func TestPassageTakenBack(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	site := newPage(t)
	s := newGrantStory(t, e, fmt.Sprintf(`{"operations":{"web_fetch":"ask","read_files":"always"},"hosts":{"only":[{"host":%q,"port":%s}]}}`, site.host, site.port))
	fetch := func() *nucleus.Error {
		if _, err := s.node.Tool(e.Context(), s.pod, nucleus.WebFetch, map[string]any{"url": site.url + "/"}); err != nil {
			return nucleus.AsError(err)
		}
		return nil
	}
	first := s.asks(fetch())
	s.grant(first, "", testenv.Passphrase, nil)
	for range 2 {
		if e := fetch(); e != nil {
			t.Fatalf("through the passage: %+v", e)
		}
	}
	s.authority.Close()
	began := time.Now()
	now, err := s.authority.Revoke(e.Context(), approvals.Revocation{ID: first, Reason: "enough"})
	if err != nil || !now.Closed || len(now.Revoked) != 1 {
		t.Fatalf("revoke: %+v, %v", now, err)
	}
	t.Logf("a passage was closed %v after it was taken back (the authority: %d ms)", time.Since(began), now.Millis)
	second := s.asks(fetch())
	if second == first {
		t.Error("the ask of before")
	}
	s.grant(second, "", testenv.Passphrase, nil)
	if e := fetch(); e != nil {
		t.Fatalf("through the second: %+v", e)
	}
	if testing.Short() {
		return
	}
	if err := syscall.Kill(authorityPID(t, e), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	for fetch() == nil {
		if time.Since(began) > approvals.Lease+time.Second {
			t.Fatalf("the passage stands %v after the authority's death", time.Since(began))
		}
		time.Sleep(100 * time.Millisecond) // it is asked how long it stands
	}
	t.Logf("a passage let through for %v after the authority's death", time.Since(began))
	if e := fetch(); e.Kind != nucleus.KindUnavailable {
		t.Errorf("%+v", e)
	}
	e.Cal("node", "start").Want(t, 0) // and with it the authority
	for deadline := time.Now().Add(approvals.Lease); ; time.Sleep(50 * time.Millisecond) {
		if fetch() == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the passage does not stand again")
		}
	}
	e.Cal("audit", "verify").Want(t, 0)
}
