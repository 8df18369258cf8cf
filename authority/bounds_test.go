package authority

import (
	"crypto/ed25519"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/approval/client"
	"cal/nucleus"
)

// asked is an ask of a pod that its own request goes with.
func (b *bench) asked(t *testing.T, pod, id string, change func(*nucleus.AskRequest)) nucleus.AskRequest {
	t.Helper()
	return askAt(t, b.c, id, func(a *nucleus.AskRequest) {
		a.Pod = pod
		signed, err := nucleus.Sign(requester, domain, testRequest{Requested{pod, nucleus.GitPush, hexOf("args")}, id})
		if err != nil {
			t.Fatal(err)
		}
		if a.Request, err = nucleus.Canonical(signed); err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(a)
		}
	})
}

// A pod cannot take the queue of all: what it has no room for is refused, and another pod's ask is
// taken. Its bytes are bounded like its asks, and what is answered makes room.
func TestPodCannotTakeTheQueue(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	if err := b.client.RegisterPod(t.Context(), "p-2", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	for i := range maxPodPending {
		b.submit(t, b.asked(t, "p-1", fmt.Sprintf("a-%d", i), nil))
	}
	_, err := b.client.Submit(t.Context(), b.asked(t, "p-1", "a-more", nil))
	wantKind(t, "one more", err, nucleus.KindRefused, fmt.Sprintf("%d asks", maxPodPending))
	b.submit(t, b.asked(t, "p-2", "a-other", nil))
	if _, err := b.client.Withdraw(t.Context(), "p-1", client.Withdrawal{Before: b.c.ms.Load() + 1}); err != nil {
		t.Fatal(err)
	}
	big := func(a *nucleus.AskRequest) {
		a.Detail = []nucleus.Detail{{Title: "content", Text: strings.Repeat("x", 3<<20)}}
	}
	for i := range maxPodPendingBytes / (3 << 20) {
		b.submit(t, b.asked(t, "p-1", fmt.Sprintf("a-big-%d", i), big))
	}
	_, err = b.client.Submit(t.Context(), b.asked(t, "p-1", "a-too-big", big))
	wantKind(t, "more bytes", err, nucleus.KindRefused, "bytes of pod p-1")
	b.submit(t, b.asked(t, "p-2", "a-big-other", big))
}

// size is what the database takes of the disk.
func (b *bench) size(t *testing.T) (bytes int64) {
	t.Helper()
	for _, suffix := range []string{"", "-wal"} {
		info, err := os.Stat(filepath.Join(b.cfg.Dir, "authority.db"+suffix))
		if err != nil {
			t.Fatal(err)
		}
		bytes += info.Size()
	}
	return bytes
}

func (b *bench) shedNow(t *testing.T, keep time.Duration, bytes int64) int {
	t.Helper()
	n, err := b.Authority.shed(keep, bytes)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What asks said goes when they have ended for a day, or are too many bytes, and the file shrinks.
// What is open, or can be used, stays; what has gone says so, with its summary and digest.
func TestShed(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	big := func(a *nucleus.AskRequest) {
		a.Detail = []nucleus.Detail{{Title: "content", Text: strings.Repeat("x", 1<<20)}}
		a.Expires = b.c.ms.Load() + 900_000
	}
	used := b.submit(t, b.asked(t, "p-1", "a-used", big))
	if _, err := b.decide(t, "a-used", typed{Approve: true, Passphrase: passphrase}); err != nil {
		t.Fatal(err)
	}
	granted, err := b.client.Status(t.Context(), "a-used")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.client.Use(t.Context(), "a-used", client.Use{Permit: "r-1", Grants: []string{granted.Grants[0].Grant}}); err != nil {
		t.Fatal(err)
	}
	const rounds, each, most = 3, 8, 8 << 20
	for round := range rounds {
		for i := range each {
			b.submit(t, b.asked(t, "p-1", fmt.Sprintf("a-%d-%d", round, i), big))
		}
		b.c.ms.Add(900_000)
	}
	full := b.size(t)
	if n := b.shedNow(t, keepFor, most); n < rounds*each-8 || n > rounds*each-most/(1<<20)+2 {
		t.Errorf("%d were shed of %d with %d bytes, at most %d are kept", n, rounds*each, full, most)
	}
	if kept, err := b.store.kept(); err != nil || kept > most {
		t.Errorf("%d bytes of asks are kept: %v", kept, err)
	}
	b.c.ms.Add(keepFor.Milliseconds())
	open := b.submit(t, b.asked(t, "p-1", "a-open", big))
	if n := b.shedNow(t, keepFor, most); n == 0 {
		t.Fatal("nothing of what ended a day ago was shed")
	}
	small := b.size(t)
	t.Logf("%d asks of 1 MiB: %.1f MB, and %.1f MB when what has ended was shed", rounds*each+1, float64(full)/1e6, float64(small)/1e6)
	if full < rounds*each<<20 || small > 5<<20 {
		t.Errorf("the database had %d bytes and has %d with one ask of 1 MiB", full, small)
	}
	if _, digest, err := b.client.Get(t.Context(), "a-open"); err != nil || digest != open.AskDigest {
		t.Errorf("the ask that is open: %v", err)
	}
	_, _, err = b.client.Get(t.Context(), "a-used")
	wantKind(t, "bytes that were shed", err, nucleus.KindRefused, used.AskDigest)
	if err := b.recordLastUse(); err != nil { // as a daemon that starts does
		t.Errorf("a use of what was shed: %v", err)
	}
	_, err = b.client.Use(t.Context(), "a-used", client.Use{Permit: "r-2", Grants: []string{granted.Grants[0].Grant}})
	wantKind(t, "a use of what was shed", err, nucleus.KindRefused, "")
	items, err := b.client.List(t.Context(), "")
	if err != nil || len(items) != rounds*each+2 {
		t.Fatalf("%d asks are listed: %v", len(items), err)
	}
	for _, i := range items {
		if i.Shed == (i.ID == "a-open") || i.Summary == "" || i.AskDigest == "" {
			t.Errorf("listed: %+v", i)
		}
	}
	list, err := b.Approvals(client.ApprovalsOf{All: true})
	if err != nil || len(list) != 1 || !list[0].Shed || list[0].State != client.Spent || len(list[0].Uses) != 1 {
		t.Errorf("what was granted: %+v, %v", list, err)
	}
	// The same request is not asked for twice, however long ago it was.
	_, err = b.client.Submit(t.Context(), b.asked(t, "p-1", "a-again", func(a *nucleus.AskRequest) {
		a.Request = b.asked(t, "p-1", "a-used", nil).Request
	}))
	wantKind(t, "a request of an ask that was shed", err, nucleus.KindUnauthenticated, "asked for before")
}

// What waits, or can still be used, is not shed, however old and large: neither what was not used
// yet nor a task that stands for longer than its ask.
func TestShedKeepsWhatLives(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	first := b.asked(t, "p-1", "a-task", nil)
	task := b.taskOf(t, first, 5)
	b.submit(t, first)
	if st, err := b.decide(t, "a-task", typed{Approve: true, Passphrase: passphrase, Task: task}); err != nil {
		t.Fatal(err)
	} else if _, err := b.client.Use(t.Context(), "a-task", client.Use{Permit: "r-1", Grants: []string{st.Grants[0].Grant}}); err != nil {
		t.Fatal(err)
	}
	b.c.ms.Add(400_000) // the task's ask has expired
	for _, id := range []string{"a-pending", "a-granted"} {
		b.submit(t, b.asked(t, "p-1", id, nil))
		if id == "a-granted" {
			if _, err := b.decide(t, id, typed{Approve: true, Passphrase: passphrase}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := b.shedNow(t, 0, 0); n != 0 {
		t.Errorf("%d were shed that live", n)
	}
	b.c.ms.Add(3_000_000)
	if n := b.shedNow(t, 0, 0); n != 3 {
		t.Errorf("%d were shed, want all 3 that have ended", n)
	}
}

// A database of an earlier version keeps all that it holds, and shrinks from then on.
func TestOldDatabaseShrinks(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "authority.db")
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=journal_mode(WAL)")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(schema + "; INSERT INTO pods VALUES ('p-1', '{}'); PRAGMA user_version = 1"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s, err := openStore(path, "ann")
		if err != nil {
			t.Fatal(err)
		}
		var mode int
		if err := s.db.QueryRow("PRAGMA auto_vacuum").Scan(&mode); err != nil || mode != 2 {
			t.Errorf("auto_vacuum is %d: %v", mode, err)
		}
		if said, err := s.pod("p-1"); err != nil || said != "{}" {
			t.Errorf("pod %q, %v", said, err)
		}
		if err := s.close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A grant that a full database does not take is no grant, is said so with a mend, and the record
// takes it back.
func TestFullDatabase(t *testing.T) {
	t.Parallel()
	var log memoryLog
	b := newBench(t, func(c *Config) { c.Recorder = &log })
	b.submit(t, b.asked(t, "p-1", "a-1", nil))
	var pages int
	if err := b.store.db.QueryRow("PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	full := func(most int) {
		t.Helper()
		if _, err := b.store.db.Exec(fmt.Sprintf("PRAGMA max_page_count = %d", most)); err != nil {
			t.Fatal(err)
		}
	}
	full(pages)
	decision := typed{Approve: true, Passphrase: passphrase, Reason: strings.Repeat("r", 500)}
	var err error
	for i := range 20 { // until no page has room left
		if _, err = b.decide(t, fmt.Sprintf("a-%d", i+1), decision); err != nil {
			break
		}
		full(1 << 30)
		b.submit(t, b.asked(t, "p-1", fmt.Sprintf("a-%d", i+2), nil))
		if err := b.store.db.QueryRow("PRAGMA page_count").Scan(&pages); err != nil {
			t.Fatal(err)
		}
		full(pages)
	}
	wantKind(t, "a grant", err, nucleus.KindUnavailable, "make room on its disk")
	entries := log.all()
	last, before := entries[len(entries)-1], entries[len(entries)-2]
	if len(before.Grants) != 1 || len(last.Grants) != 1 {
		t.Fatalf("%v: recorded: %+v, %+v", err, before, last)
	}
	if before.Kind != nucleus.KindApprovalGrant || last.Kind != nucleus.KindApprovalRefuse || last.Grants[0] != before.Grants[0] || last.Ask != before.Ask {
		t.Errorf("recorded: %+v, %+v", before, last)
	}
	full(1 << 30)
	if now, err := b.decide(t, last.Ask, decision); err != nil || now.State != client.Granted {
		t.Errorf("once there is room: %+v, %v", now, err)
	}
}

// memoryLog is a Recorder in memory.
type memoryLog struct {
	mu      sync.Mutex
	entries []nucleus.Entry
}

func (m *memoryLog) Record(e nucleus.Entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries = append(m.entries, e)
	return nil
}

func (m *memoryLog) HasUse(permit string) (bool, error) {
	return slices.ContainsFunc(m.all(), func(e nucleus.Entry) bool { return e.Kind == nucleus.KindApprovalUse && e.Permit == permit }), nil
}

func (m *memoryLog) all() []nucleus.Entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.entries)
}

// The list of what was granted is bounded, newest first, and what can be used is found among many
// that cannot.
func TestApprovalsAreBounded(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.granted(t, "a-old", 0)
	tx, err := b.store.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	const many = 300
	for i := range many {
		id := fmt.Sprintf("a-%d", i)
		for _, insert := range []string{
			"INSERT INTO asks SELECT ?, sha256, canonical, ?1, pod, op, summary, need, created_ms + 1, expires_ms, 'granted', reason, decided_ms, about FROM asks WHERE id = 'a-old'",
			"INSERT INTO grants SELECT ?1, ?1, approver, reason, token, given_ms FROM grants WHERE ask = 'a-old'",
			"INSERT INTO uses VALUES (?1, 1, ?1, 1, 'done')",
		} {
			if _, err := tx.Exec(insert, id); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	b.c.ms.Add(10)
	b.granted(t, "a-new", 0)
	began := time.Now()
	list, err := b.client.Approvals(t.Context(), client.ApprovalsOf{All: true, Limit: 100})
	took := time.Since(began)
	if err != nil || len(list) != 100 || list[0].Ask != "a-new" || list[1].State != client.Spent {
		t.Fatalf("%d approvals, %v", len(list), err)
	}
	list, err = b.client.Approvals(t.Context(), client.ApprovalsOf{All: true})
	if err != nil || len(list) != min(many+2, client.MaxApprovals) {
		t.Errorf("without a limit: %d approvals, %v", len(list), err)
	}
	began = time.Now()
	list, err = b.client.Approvals(t.Context(), client.ApprovalsOf{})
	if err != nil || len(list) != 2 || list[0].Ask != "a-new" || list[1].Ask != "a-old" {
		t.Errorf("what can be used: %+v, %v", list, err)
	}
	t.Logf("of %d: the newest 100 in %v, what can be used in %v", many+2, took, time.Since(began))
	_, err = b.client.Approvals(t.Context(), client.ApprovalsOf{Limit: client.MaxApprovals + 1})
	wantKind(t, "a larger limit", err, nucleus.KindInvalid, "at most 1000")
}

// Long asks, of what takes longest to read, hold up nobody: neither what is listed, nor
// taken back, nor a use beside the removal of what has ended.
func TestLongAsksHoldNobodyUp(t *testing.T) {
	b := newBench(t, nil)
	long := func(a *nucleus.AskRequest) {
		a.Detail = []nucleus.Detail{{Title: "c", Text: strings.Repeat("\u202e\"\\x", 150_000)}}
	}
	var used []string
	for i := range 4 {
		id := fmt.Sprintf("a-%d", i)
		b.submit(t, b.asked(t, "p-1", id, long))
		status, err := b.decide(t, id, typed{Approve: true, Approver: "ann", Passphrase: passphrase})
		if err != nil {
			t.Fatal(err)
		}
		used = append(used, status.Grants[0].Grant)
	}
	quick := func(what string, do func() error) {
		t.Helper()
		began := time.Now()
		err := do()
		took := time.Since(began)
		t.Logf("%s: %v", what, took)
		if err != nil || took > 500*time.Millisecond {
			t.Errorf("%s took %v: %v", what, took, err)
		}
	}
	quick("listed", func() error {
		list, err := b.client.Approvals(t.Context(), client.ApprovalsOf{})
		if len(list) != len(used) {
			t.Errorf("%d are listed", len(list))
		}
		return err
	})
	quick("used", func() error { return b.use(t, "a-0", "r-1", used[:1]) })
	quick("looked at", func() error { _, err := b.Authority.shed(keepFor, 0); return err })
	quick("taken back", func() error { _, err := b.client.Revoke(t.Context(), client.Revocation{ID: "p-1"}); return err })
}
