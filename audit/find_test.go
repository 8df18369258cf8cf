package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"cal/nucleus"
)

// makeVaried makes a log with one entry for each, a second apart.
func makeVaried(t testing.TB, entries ...nucleus.Entry) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l := mustOpen(t, dir, Options{Origin: testOrigin, Key: testKey, Now: func() time.Time { now = now.Add(time.Second); return now }})
	for _, e := range entries {
		if at, err := time.Parse(time.RFC3339Nano, e.Time); err == nil {
			now = at // from here on
		}
		appendAll(t, l, e)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func found(t testing.TB, dir string, f Filter) (seqs []int64) {
	t.Helper()
	for raw, err := range Find(dir, 0, f) {
		if err != nil {
			t.Fatal(err)
		}
		seq, ok := Seq(raw)
		if !ok {
			t.Fatalf("no sequence number: %s", raw)
		}
		seqs = append(seqs, seq)
	}
	return seqs
}

func TestFind(t *testing.T) {
	js := func(text string) json.RawMessage { return json.RawMessage(text) }
	dir := makeVaried(t,
		nucleus.Entry{Kind: nucleus.KindIntent, Pod: "p-1", Session: "s-1", Actor: "k", Op: nucleus.ReadFiles, Verdict: nucleus.Allow, Args: js(`{"op":"read_files"}`)},
		nucleus.Entry{Kind: nucleus.KindIntent, Pod: "p-2", Session: "s-2", Op: nucleus.WebFetch, Verdict: nucleus.Deny, Args: js(`{"fetch":{"host":"example.org"},"op":"web_fetch"}`)},
		nucleus.Entry{Kind: nucleus.KindApprovalAsk, Pod: "p-1", Session: "s-1", Op: nucleus.GitPush, Verdict: nucleus.Ask, Args: js(`{"push":{"remote":"https://git.example.org/a.git"}}`)},
		nucleus.Entry{Kind: nucleus.KindEgressOpen, Pod: "p-1", Session: "s-1", Data: js(`{"host":"example.org","port":443}`)},
		// What an agent wrote imitates other entries.
		nucleus.Entry{Kind: nucleus.KindIntent, Pod: "p-3", Session: "s-3", Actor: `","pod":"p-1`, Args: js(`{"x":"\"pod\":\"p-1\",\"kind\":\"approval.ask\"","pod":"p-1","session":"s-1","time":"2026-01-02T03:04:06Z","kind":"approval.ask"}`)},
		nucleus.Entry{Kind: nucleus.KindIntent, Pod: "p-3", Session: "s-3", Args: js(`["example.org"]`)},
		nucleus.Entry{Kind: nucleus.KindPodStop, Pod: "p-\"q\"\u202e", Session: "s-3"},
	)
	at := func(second int) time.Time { return time.Date(2026, 1, 2, 3, 4, 5+second, 0, time.UTC) }
	for _, c := range []struct {
		name string
		f    Filter
		want []int64
	}{
		{"all", Filter{}, []int64{0, 1, 2, 3, 4, 5, 6}},
		{"pod", Filter{Pod: "p-1"}, []int64{0, 2, 3}},
		{"no such pod", Filter{Pod: "p-"}, nil},
		{"pod of odd letters", Filter{Pod: "p-\"q\"\u202e"}, []int64{6}},
		{"pod that is not UTF-8", Filter{Pod: "p-\xff"}, nil},
		{"session", Filter{Session: "s-1"}, []int64{0, 2, 3}},
		{"actor", Filter{Actor: "k"}, []int64{0}},
		{"operation", Filter{Op: nucleus.WebFetch}, []int64{1}},
		{"decision", Filter{Verdict: nucleus.Ask}, []int64{2}},
		{"kind", Filter{Kind: nucleus.KindApprovalAsk}, []int64{2}},
		{"kinds", Filter{Kind: "approval.*"}, []int64{2}},
		{"host", Filter{Host: "example.org"}, []int64{1, 3}},
		{"host of a remote", Filter{Host: "git.example.org"}, []int64{2}},
		{"host in part", Filter{Host: "example"}, nil},
		{"since", Filter{Since: at(6)}, []int64{5, 6}},
		{"until", Filter{Until: at(2)}, []int64{0}},
		{"between", Filter{Since: at(2), Until: at(4)}, []int64{1, 2}},
		{"several", Filter{Pod: "p-1", Kind: "request.*"}, []int64{0}},
	} {
		if got := found(t, dir, c.f); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestTail(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	defer l.Close()
	appendEntries(t, l, 0, 4)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []int64
	for raw, err := range Tail(ctx, dir, 1, Filter{Kind: nucleus.KindIntent}, time.Millisecond) {
		if err != nil {
			t.Fatal(err)
		}
		seq, _ := Seq(raw)
		if got = append(got, seq); len(got) == 1 {
			appendEntries(t, l, 4, 300) // while it waits
			if err := l.Publish(); err != nil {
				t.Fatal(err)
			}
		}
		if seq == 302 {
			cancel()
		}
	}
	if len(got) != 151 || got[0] != 2 || got[150] != 302 {
		t.Errorf("got %d entries: %v", len(got), got)
	}
}

func TestCompare(t *testing.T) {
	ask := nucleus.Entry{Kind: nucleus.KindApprovalAsk, Ask: "a-1", Digest: "d-1", Op: nucleus.GitPush}
	use := nucleus.Entry{Kind: nucleus.KindApprovalUse, Ask: "a-1", Digest: "d-1", Grants: []string{"g-1"}}
	grant := nucleus.Entry{Kind: nucleus.KindApprovalGrant, Ask: "a-1", Digest: "d-1", Grants: []string{"g-1"}}
	const one, two, task = `{"need":1}`, `{"need":2}`, `{"need":1,"task":{"uses":3,"until_ms":1767326645000,"exposure":0,"match":{}}}`
	by := func(approver, id, data string) nucleus.Entry {
		e := grant
		e.Actor, e.Grants, e.Data = approver, []string{id}, json.RawMessage(data)
		return e
	}
	numbered := func(n int, ids ...string) nucleus.Entry {
		e := use
		e.Permit, e.Grants, e.Data = fmt.Sprint("r-", n), ids, json.RawMessage(fmt.Sprintf(`{"n":%d,"of":1}`, n))
		return e
	}
	counted := numbered
	effect := func(permit string, ids ...string) nucleus.Entry {
		return nucleus.Entry{Kind: nucleus.KindIntent, Op: nucleus.GitPush, Verdict: nucleus.Ask, Ask: "a-1", Permit: permit, Grants: ids}
	}
	unasked, attempt, refused, passage := effect("r-9"), effect("", "g-1"), effect(""), numbered(1, "g-1")
	unasked.Ask, attempt.Data, refused.Status = "", json.RawMessage(`{"attempt":"eg-1"}`), nucleus.OutcomeRefused
	passage.Data = json.RawMessage(`{"n":1,"of":1,"passage":{"host":"h","port":1}}`)
	late := func(e nucleus.Entry, after time.Duration) nucleus.Entry {
		e.Time = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(after).Format(time.RFC3339Nano)
		return e
	}
	ending, standing := passage, by("ann", "g-1", `{"need":1,"passage_ms":60000}`)
	ending.Data = json.RawMessage(`{"n":1,"of":1,"passage":{"until_ms":1767323105000}}`) // a minute on
	uncounted := nucleus.Entry{Kind: nucleus.KindApprovalRefuse, Ask: "a-1", Permit: "r-1", Grants: []string{"g-1"}, Data: json.RawMessage(`{"uncounted":true}`)}
	refusal := uncounted
	refusal.Data = json.RawMessage(`{"why":"used before"}`)
	revoked := nucleus.Entry{Kind: nucleus.KindApprovalRevoke, Ask: "a-1", Grants: []string{"g-1"}}
	otherAsk, otherGrant := ask, grant
	otherAsk.Digest, otherGrant.Ask = "d-2", "a-2"
	for _, c := range []struct {
		name            string
		node, authority []nucleus.Entry
		want            []ProblemKind
	}{
		{"they agree", []nucleus.Entry{ask, use}, []nucleus.Entry{ask, grant}, nil},
		{"asked and not answered", []nucleus.Entry{ask}, []nucleus.Entry{ask}, nil},
		{"not shown yet", []nucleus.Entry{ask}, nil, nil},
		{"used without a grant", []nucleus.Entry{ask, use}, []nucleus.Entry{ask}, []ProblemKind{Ungranted}},
		{"the grant of another ask", []nucleus.Entry{ask, use}, []nucleus.Entry{ask, otherGrant}, []ProblemKind{Ungranted}},
		{"the node's log was cut", nil, []nucleus.Entry{ask, grant}, []ProblemKind{Missing}},
		{"another digest", []nucleus.Entry{otherAsk}, []nucleus.Entry{ask}, []ProblemKind{Changed}},

		{"two of two", []nucleus.Entry{ask, numbered(1, "g-1", "g-2")}, []nucleus.Entry{ask, by("ann", "g-1", two), by("bob", "g-2", two), counted(1, "g-1", "g-2")}, nil},
		{"one of two", []nucleus.Entry{ask, numbered(1, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", two), by("bob", "g-2", two), counted(1, "g-1")}, []ProblemKind{TooFew}},
		{"two of one approver", []nucleus.Entry{ask, numbered(1, "g-1", "g-2")}, []nucleus.Entry{ask, by("ann", "g-1", two), by("ann", "g-2", two), counted(1, "g-1", "g-2")}, []ProblemKind{TooFew}},
		{"a task", []nucleus.Entry{ask, numbered(1, "g-1"), numbered(2, "g-1"), numbered(3, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", task), counted(1, "g-1"), counted(2, "g-1"), counted(3, "g-1")}, nil},
		{"a use more than the task has", []nucleus.Entry{ask, numbered(1, "g-1"), numbered(2, "g-1"), numbered(3, "g-1"), numbered(4, "g-1")},
			[]nucleus.Entry{ask, by("ann", "g-1", task), counted(1, "g-1"), counted(2, "g-1"), counted(3, "g-1"), counted(4, "g-1")}, []ProblemKind{TooOften, TooOften}},
		{"used twice", []nucleus.Entry{ask, numbered(1, "g-1"), numbered(2, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, []ProblemKind{Uncounted, TooOften}},
		{"not counted", []nucleus.Entry{ask, numbered(1, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one)}, []ProblemKind{Uncounted}},
		{"counted and not used", []nucleus.Entry{ask}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, nil},
		{"taken back after its use", []nucleus.Entry{ask, numbered(1, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), revoked}, nil},
		{"used after it was taken back", []nucleus.Entry{ask, numbered(1, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), revoked, counted(1, "g-1")}, []ProblemKind{Revoked}},
		{"one grant was taken back, two others were used", []nucleus.Entry{ask, numbered(1, "g-2", "g-3")},
			[]nucleus.Entry{ask, by("ann", "g-1", two), revoked, by("bob", "g-2", two), by("carol", "g-3", two), counted(1, "g-2", "g-3")}, nil},

		{"an effect by a use", []nucleus.Entry{ask, numbered(1, "g-1"), effect("r-1", "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, nil},
		{"an effect by no grant", []nucleus.Entry{ask, numbered(1, "g-1"), effect("r-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, []ProblemKind{Ungranted}},
		{"an effect that nobody was asked for", []nucleus.Entry{unasked}, nil, []ProblemKind{Ungranted}},
		{"a second effect by one use", []nucleus.Entry{ask, numbered(1, "g-1"), effect("r-1", "g-1"), effect("r-2", "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, []ProblemKind{Ungranted}},
		{"two through a passage", []nucleus.Entry{ask, passage, effect("r-1", "g-1"), effect("r-2", "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, nil},
		{"a program's through a passage", []nucleus.Entry{ask, passage, attempt}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, nil},
		{"through a passage until it is taken back", []nucleus.Entry{ask, passage, effect("r-2", "g-1"), revoked}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), late(revoked, time.Minute)}, nil},
		{"through a passage that the node knows to be taken back", []nucleus.Entry{ask, passage, revoked, effect("r-2", "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), late(revoked, time.Minute)}, []ProblemKind{Revoked}},
		{"through a passage within the lease", []nucleus.Entry{ask, passage, late(effect("r-2", "g-1"), 70*time.Second)}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), late(revoked, time.Minute)}, nil},
		{"through a passage that was taken back", []nucleus.Entry{ask, passage, late(effect("r-2", "g-1"), 80*time.Second)}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), late(revoked, time.Minute)}, []ProblemKind{Revoked}},
		{"another grant was taken back", []nucleus.Entry{ask, passage, late(effect("r-2", "g-1"), 80*time.Second)}, []nucleus.Entry{ask, func() nucleus.Entry { e := revoked; e.Grants = []string{"g-0"}; return e }(), by("ann", "g-1", one), counted(1, "g-1")}, nil},
		{"through a passage that has ended", []nucleus.Entry{ask, ending, late(effect("r-2", "g-1"), 80*time.Second)}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1")}, []ProblemKind{Expired}},
		{"through a passage that the authority knows to have ended", []nucleus.Entry{ask, passage, late(effect("r-2", "g-1"), 90*time.Second)}, []nucleus.Entry{ask, standing, counted(1, "g-1")}, []ProblemKind{Expired}},
		{"through a passage that stands", []nucleus.Entry{ask, ending, late(effect("r-2", "g-1"), 50*time.Second)}, []nucleus.Entry{ask, standing, counted(1, "g-1")}, nil},
		{"a task after its time", []nucleus.Entry{ask, numbered(1, "g-1"), numbered(2, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", task), counted(1, "g-1"), late(counted(2, "g-1"), 2*time.Hour)}, []ProblemKind{Expired}},
		{"a use that does not count, and one", []nucleus.Entry{ask, numbered(2, "g-1"), effect("r-2", "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), uncounted, counted(2, "g-1")}, nil},
		{"a use that does not count", []nucleus.Entry{ask, numbered(1, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), uncounted}, []ProblemKind{Uncounted}},
		{"a use that is refused once more", []nucleus.Entry{ask, numbered(1, "g-1")}, []nucleus.Entry{ask, by("ann", "g-1", one), counted(1, "g-1"), refusal}, nil},
		{"a refused one", []nucleus.Entry{ask, refused}, []nucleus.Entry{ask}, nil},
	} {
		problems, err := Compare(makeVaried(t, c.node...), makeVaried(t, c.authority...))
		var kinds []ProblemKind
		for _, p := range problems {
			kinds = append(kinds, p.Kind)
		}
		if err != nil || !slices.Equal(kinds, c.want) {
			t.Errorf("%s: got %v, %v; want %v", c.name, problems, err, c.want)
		}
	}
}

// BenchmarkFind selects from 200,000 entries.
func BenchmarkFind(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "log")
	l := mustOpen(b, dir, testOptions())
	const n = 200_000
	var pending []*Pending
	for i := range n {
		e := entryNumber(i)
		e.Session = fmt.Sprintf("s-%d", i/1000)
		p, err := l.Begin(e)
		if err != nil {
			b.Fatal(err)
		}
		if pending = append(pending, p); len(pending) == 1000 || i == n-1 {
			for _, p := range pending {
				if _, err := p.Wait(); err != nil {
					b.Fatal(err)
				}
			}
			pending = pending[:0]
		}
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	for name, f := range map[string]Filter{"all": {}, "session": {Session: "s-77"}, "host": {Host: "example.org"}, "since": {Since: time.Unix(1800000000, 0)}} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				count := 0
				for _, err := range Find(dir, 0, f) {
					if err != nil {
						b.Fatal(err)
					}
					count++
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}
