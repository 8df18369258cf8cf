package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"cal/internal/testenv"
	"cal/node/client"
	"cal/nucleus"
)

// TestPlacesNeedThePerson lets the agent fetch from a place and a program connect to it, when
// each needs a person: refused with the ask, granted by the authority's own program, let
// through for that place, and asked anew when what the person was told is no longer so: the
// session has read a repository that cannot be trusted, or the node has died.
func TestPlacesNeedThePerson(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("the machine's programs are the host's, and here is no curl: ", err)
	}
	e := testenv.New(t)
	e.Approver()
	site, other := newPage(t), newPage(t)
	repo := e.Repo("greeter", greeter()) // its remote is nobody's trusted origin
	e.Cal("node", "start").Want(t, 0)
	s := &placeStory{t: t, e: e, node: e.Client()}
	pod, err := s.node.CreatePod(e.Context(), nucleus.PodSpec{
		Mode: nucleus.Mediated, Image: nucleus.Image{Kind: "host"}, Repos: []nucleus.Repo{{Name: "greeter", Path: repo.Dir, Branch: "agent/x"}},
		Policy: fmt.Appendf(nil, `{"name":"places","operations":{"read_files":"always","run_bash":"always","web_fetch":"ask","net_connect":"always"},"hosts":{"only":[{"host":%q,"port":%s},{"host":%q,"port":%s}]}}`,
			site.host, site.port, other.host, other.port),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.pod = pod.ID
	came := func(want int) {
		t.Helper()
		hits, _ := site.seen()
		elsewhere, _ := other.seen()
		if hits != want || elsewhere != 0 {
			t.Errorf("%d requests came to the site and %d to the other, want %d and none", hits, elsewhere, want)
		}
	}

	// The agent fetches before it has read anything.
	first := s.fetch(site.url + "/docs").asks(t)
	screen := e.Grant(first)
	for _, text := range []string{"every web_fetch of this session", `"` + site.host + `" port ` + site.port, "1h0m0s from its first use", "exposure    none", "open this passage?"} {
		if !strings.Contains(screen, text) {
			t.Errorf("the authority did not show %q:\n%s", text, screen)
		}
	}
	for _, path := range []string{"/docs", "/more"} {
		if a := s.fetch(site.url + path); a.refused != nil || !strings.Contains(a.text, "Assistant: push") {
			t.Errorf("a granted fetch of %s: %+v", path, a)
		}
	}
	// The proxy in the machine has admitted both, by the one grant.
	admitted := e.Entries(func(entry nucleus.Entry) bool {
		var outcome nucleus.Outcome
		return entry.Kind == nucleus.KindOutcome && entry.Op == nucleus.WebFetch && entry.Status == nucleus.OutcomeDone &&
			json.Unmarshal(entry.Outcome.Payload, &outcome) == nil && outcome.Admission != nil
	})
	if len(admitted) != 2 {
		t.Errorf("%d fetches have the machine's word in the log, want 2", len(admitted))
	}
	s.fetch(other.url + "/").asks(t)
	came(2)
	// It reads a file of the untrusted repository: more than the person was told of.
	if _, err := s.node.Tool(e.Context(), s.pod, nucleus.ReadFiles, map[string]any{"path": "greeter/greet.sh"}); err != nil {
		t.Fatal(err)
	}
	second := s.fetch(site.url + "/collect").asks(t)
	if second == first {
		t.Error("the ask of before the untrusted file")
	}
	e.Cal("approve", "show", second).Want(t, 0, "private, untrusted", "trifecta", "read_files greeter/greet.sh")
	came(2)

	// A program connects: by HTTP, by CONNECT, by SOCKS, and gets one ask.
	connect := s.curl("-x", "http://127.0.0.1:8080", site.url+"/").asks(t)
	if connect == first || connect == second {
		t.Error("a connection shares the ask of a fetch")
	}
	if again := s.curl("-x", "http://127.0.0.1:8080", site.url+"/again").asks(t); again != connect {
		t.Errorf("a retry is ask %s, not %s", again, connect)
	}
	if a := s.curl("-x", "http://127.0.0.1:8080", "-p", site.url+"/"); a.code != 56 || !strings.Contains(a.err, "403") {
		t.Errorf("CONNECT: %+v", a)
	}
	if a := s.curl("--socks5-hostname", "127.0.0.1:1080", site.url+"/"); a.code != 97 || !strings.Contains(a.err, "(2)") {
		t.Errorf("SOCKS: %+v, want reply 2", a)
	}
	e.Cal("approve", "list").Want(t, 0, connect+"  pending", "net_connect "+site.host+":"+site.port)
	inLog := e.Entries(func(entry nucleus.Entry) bool {
		return entry.Kind == nucleus.KindIntent && entry.Op == nucleus.NetConnect && entry.Ask == connect && entry.Status == nucleus.OutcomeRefused
	})
	if len(inLog) != 4 {
		t.Errorf("%d refusals with the ask in the log, want 4", len(inLog))
	}
	came(2)
	screen = e.Grant(connect)
	for _, text := range []string{"every net_connect of this session", "GET " + site.url + "/", site.host + ", as asked for", "private, untrusted"} {
		if !strings.Contains(screen, text) {
			t.Errorf("the authority did not show %q:\n%s", text, screen)
		}
	}
	for _, way := range [][]string{{"-x", "http://127.0.0.1:8080"}, {"-x", "http://127.0.0.1:8080", "-p"}, {"--socks5-hostname", "127.0.0.1:1080"}} {
		if a := s.curl(append(way, site.url+"/")...); a.code != 0 || a.refused != nil || !strings.Contains(a.text, "Assistant: push") {
			t.Errorf("%v after the grant: %+v", way, a)
		}
	}
	came(5)

	// Another port is another place; the person's no to it holds.
	elsewhere := s.curl("-x", "http://127.0.0.1:8080", other.url+"/").asks(t)
	e.Cal("approve", "deny", elsewhere, "--reason", "not there").Want(t, 0)
	for range 2 {
		if a := s.curl("-x", "http://127.0.0.1:8080", other.url+"/"); a.refused == nil || a.refused.Kind != nucleus.KindRefused || a.refused.Ask != elsewhere || !strings.Contains(a.text, "not there") {
			t.Errorf("after a no: %+v", a)
		}
	}
	came(5)

	// The node dies: its passages die with it, the grant stays used up.
	pid, err := e.NodePID()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	e.Cal("node", "start").Want(t, 0)
	if after := s.curl("-x", "http://127.0.0.1:8080", site.url+"/").asks(t); after == connect {
		t.Error("the ask of the node before")
	}
	came(5)

	uses := e.Entries(of(nucleus.KindApprovalUse, nucleus.NetConnect))
	if len(uses) != 1 || uses[0].Ask != connect {
		t.Fatalf("uses: %+v", uses)
	}
	for _, open := range e.Entries(of(nucleus.KindEgressOpen, nucleus.NetConnect)) {
		if len(open.Grants) != 1 || open.Grants[0] != uses[0].Grants[0] {
			t.Errorf("entry %d opens a connection without the grant: %+v", open.Seq, open)
		}
	}
	if err := s.node.DeletePod(e.Context(), s.pod); err != nil {
		t.Error(err)
	}
	e.Verify()
}

// placeStory is one session's attempts at places.
type placeStory struct {
	t    *testing.T
	e    *testenv.Env
	node *client.Client
	pod  string
}

// attempt is what came of one.
type attempt struct {
	text, err string
	code      int
	refused   *nucleus.Error
}

// asks is the id of the ask that an attempt was refused with.
func (a attempt) asks(t *testing.T) string {
	t.Helper()
	if a.refused == nil || a.refused.Kind != nucleus.KindApproval || a.refused.Ask == "" {
		t.Fatalf("got %+v, want a refusal with an ask", a)
	}
	return a.refused.Ask
}

// fetch is the agent's.
func (s *placeStory) fetch(url string) attempt {
	value, err := s.node.Tool(s.e.Context(), s.pod, nucleus.WebFetch, map[string]any{"url": url})
	if err != nil {
		return attempt{refused: nucleus.AsError(err)}
	}
	return attempt{text: string(value)}
}

// curl is a program's; NO_PROXY of the machine names loopback.
func (s *placeStory) curl(args ...string) attempt {
	s.t.Helper()
	argv := append([]string{"curl", "-sS", "-m", "10", "--noproxy", ""}, args...)
	value, err := s.node.Tool(s.e.Context(), s.pod, nucleus.RunBash, map[string]any{"argv": argv})
	if err != nil {
		s.t.Fatal(err)
	}
	var run struct {
		ExitCode       int `json:"exit_code"`
		Stdout, Stderr string
	}
	if err := json.Unmarshal(value, &run); err != nil {
		s.t.Fatal(err)
	}
	a := attempt{text: run.Stdout, err: run.Stderr, code: run.ExitCode}
	var body struct {
		Error *nucleus.Error `json:"error"`
	}
	if json.Unmarshal([]byte(run.Stdout), &body) == nil {
		a.refused = body.Error
	}
	return a
}
