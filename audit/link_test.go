package audit

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"cal/nucleus"
)

func linkedOptions() Options {
	o := testOptions()
	o.Link = true
	return o
}

func ofSession(session, kind string) nucleus.Entry {
	return nucleus.Entry{Pod: "p-" + session, Session: session, Kind: kind}
}

// checkLinks compares the link of every entry with the entries themselves.
func checkLinks(t *testing.T, dir string) {
	t.Helper()
	newest := map[string]int64{}
	for raw, err := range Find(dir, 0, Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		e, err := decode(raw)
		if err != nil {
			t.Fatal(err)
		}
		before, ok := newest[e.Session]
		switch {
		case e.Session == "" || !ok:
			if e.Prev != nil {
				t.Errorf("entry %d names %d, want none", e.Seq, *e.Prev)
			}
		case e.Prev == nil:
			t.Errorf("entry %d of %s names none, want %d", e.Seq, e.Session, before)
		case *e.Prev != before:
			t.Errorf("entry %d of %s names %d, want %d", e.Seq, e.Session, *e.Prev, before)
		}
		newest[e.Session] = e.Seq
	}
	report, err := Verify(dir, VerifyOptions{Key: testVerifier})
	if err != nil || !report.OK() {
		t.Errorf("%v, %+v", err, report)
	}
}

// Each entry names the one before it of its session: written by many at once, over starts
// of the log, when what is remembered overflows, and wherever in the log the one before is.
func TestLinks(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, linkedOptions())
	sessions := []string{"s-a", "s-b", "s-\u00e9\"\\"}
	for _, s := range sessions {
		appendAll(t, l, ofSession(s, nucleus.KindPodCreate))
	}
	appendAll(t, l, nucleus.Entry{Kind: "log.test"})
	var writers sync.WaitGroup
	for i := range 16 {
		writers.Go(func() {
			for n := range 40 {
				if _, err := l.Append(ofSession(sessions[(i+n)%3], nucleus.KindIntent)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	for i := range maxLinks + 10 { // s-a is forgotten; its newest entry is in a bundle of long ago
		p, err := l.Begin(ofSession(fmt.Sprintf("s-%d", i), nucleus.KindPodCreate))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(l.links.last); n > maxLinks {
		t.Errorf("%d sessions are remembered, at most %d", n, maxLinks)
	}
	appendAll(t, l, ofSession("s-a", nucleus.KindIntent), ofSession("s-a", nucleus.KindOutcome))
	for range 2 { // an empty journal, and one that has entries
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = mustOpen(t, dir, linkedOptions())
		appendAll(t, l, ofSession("s-b", nucleus.KindIntent), ofSession("s-7", nucleus.KindPodEnd), ofSession("s-new", nucleus.KindIntent))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	checkLinks(t, dir)

	l = mustOpen(t, dir, linkedOptions())
	defer l.Close()
	for _, session := range []string{"s-a", "s-b", "s-7", "s-none"} {
		var want, got []int64
		for raw, err := range Find(dir, 0, Filter{Session: session}) {
			g, lookErr := look(raw)
			if err != nil || lookErr != nil {
				t.Fatal(err, lookErr)
			}
			want = append([]int64{g.seq}, want...)
		}
		for e, err := range l.Backward(session) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e.Seq)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s backward: %d, want %d", session, got, want)
		}
	}
}

// What is not on the disk yet is not forgotten, however much there is.
func TestLinksInTheQueue(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, linkedOptions())
	var waiting []*Pending
	begin := func(e nucleus.Entry) {
		p, err := l.Begin(e)
		if err != nil {
			t.Fatal(err)
		}
		waiting = append(waiting, p)
	}
	begin(ofSession("s-a", nucleus.KindPodCreate))
	for i := range maxLinks + 10 {
		begin(ofSession(fmt.Sprintf("s-%d", i), nucleus.KindPodCreate))
	}
	begin(ofSession("s-a", nucleus.KindIntent))
	for _, p := range waiting {
		if _, err := p.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	checkLinks(t, dir)
}

// What could not be written is not named: it may not be there.
func TestLinksAfterFailure(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	disk := &failing{}
	var err error
	if disk.FS, err = openFiles(dir); err != nil {
		t.Fatal(err)
	}
	o := linkedOptions()
	o.FS = disk
	l := mustOpen(t, dir, o)
	appendAll(t, l, ofSession("s-a", nucleus.KindPodCreate))
	disk.broken = true
	for range 2 {
		if _, err := l.Append(ofSession("s-a", nucleus.KindIntent)); !errors.Is(err, ErrFailed) {
			t.Fatalf("got %v", err)
		}
	}
	disk.broken = false
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	appendAll(t, l, ofSession("s-b", nucleus.KindPodCreate), ofSession("s-a", nucleus.KindOutcome))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	checkLinks(t, dir)
}

// failing is a disk whose journal cannot be written while it is broken.
type failing struct {
	FS
	broken bool
}

func (f *failing) Append(name string) (File, error) {
	file, err := f.FS.Append(name)
	return failingFile{file, f}, err
}

type failingFile struct {
	File
	disk *failing
}

func (f failingFile) Write(p []byte) (int, error) {
	if f.disk.broken {
		return 0, errors.New("no space")
	}
	return f.File.Write(p)
}

// linkedSessions is a log in which two sessions take turns, from their beginning to their end.
func linkedSessions(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, linkedOptions())
	for _, kind := range []string{nucleus.KindPodCreate, nucleus.KindPodStart, nucleus.KindIntent, nucleus.KindOutcome, nucleus.KindPodStop, nucleus.KindPodEnd} {
		a, b := ofSession("s-a", kind), ofSession("s-b", kind)
		if kind == nucleus.KindIntent || kind == nucleus.KindOutcome {
			a.Permit, b.Permit = "r-a", "r-b"
		}
		appendAll(t, l, a, b)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A receipt says that it leaves none out exactly where it does not. Who has the directory
// can make one without any of the entries, with all the right hashes; it is refused, or
// says that it may not be all: the first ones or the last ones.
func TestReceiptIsComplete(t *testing.T) {
	dir := linkedSessions(t)
	v, err := VerifyReceipt(mustReceipt(t, dir, ReceiptOptions{Session: "s-b"}), VerifyReceiptOptions{Key: testVerifier})
	if err != nil || !v.Begins || !v.Linked || !v.Ends || len(v.Entries) != 6 {
		t.Fatalf("%v, %+v", err, v)
	}
	if says := strings.Join(v.Says(), "\n"); !strings.Contains(says, "none is left out; the last one ends it") {
		t.Errorf("it says %s", says)
	}
	for shown := 1; shown < 1<<6-1; shown++ {
		raw := partReceipt(t, dir, "s-b", shown)
		if shown&(shown+1) != 0 {
			wantRefused(t, raw, VerifyReceiptOptions{}, Missing)
			continue
		}
		v, err := VerifyReceipt(raw, VerifyReceiptOptions{Key: testVerifier}) // its first entries, without the last
		if err != nil || !v.Begins || !v.Linked || v.Ends {
			t.Errorf("shown %b: %v, %+v", shown, err, v)
			continue
		}
		if says := strings.Join(v.Says(), "\n"); !strings.Contains(says, fmt.Sprintf("what came after entry %d, it does not prove", v.Last)) || strings.Contains(says, "ends it") {
			t.Errorf("it says %s", says)
		}
	}
}

// partReceipt is what somebody with the directory can make: a receipt of those entries of a
// session whose bit is set, with the right hashes.
func partReceipt(t *testing.T, dir, session string, shown int) []byte {
	t.Helper()
	w, err := openView(dir, testVerifier, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	whole, err := w.receipt(dir, session, true)
	if err != nil {
		t.Fatal(err)
	}
	part := &receipt{session: whole.session, note: whole.note}
	for i := range whole.entries {
		if shown>>i&1 == 1 {
			part.indexes, part.entries = append(part.indexes, whole.indexes[i]), append(part.entries, whole.entries[i])
		}
	}
	if part.hashes, err = w.prove(part.indexes); err != nil {
		t.Fatal(err)
	}
	raw, err := part.encode(false)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// A log without links claims nothing of the kind.
func TestReceiptWithoutLinks(t *testing.T) {
	v, err := VerifyReceipt(mustReceipt(t, makeSessions(t, 2), ReceiptOptions{Session: "s-b"}), VerifyReceiptOptions{Key: testVerifier})
	if err != nil || v.Linked || v.Begins || v.Ends || strings.Contains(strings.Join(v.Says(), "\n"), "none is left out") {
		t.Errorf("%v, %+v", err, v)
	}
}

// The holder of the log's key can write what it likes; an entry that names another than the
// one before it is found by whoever reads the whole log.
func TestVerifyFindsWrongLink(t *testing.T) {
	for name, c := range map[string]struct {
		links []int64 // of the entries of one session: -1 none
		wrong []int64
	}{
		"right":                 {[]int64{-1, 0, 1, 2}, nil},
		"none":                  {[]int64{-1, -1, 1, -1}, nil},
		"one is passed over":    {[]int64{-1, 0, 0, 2}, []int64{2}},
		"of a later one":        {[]int64{-1, 0, 3, 2}, []int64{2}},
		"of itself":             {[]int64{-1, 1, 1, 2}, []int64{1}},
		"the first has one":     {[]int64{0, 0, 1, 2}, []int64{0}},
		"of one that is not":    {[]int64{-1, 0, 1, 70}, []int64{3}},
		"two name the same one": {[]int64{-1, 0, 1, 1}, []int64{3}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			l := mustOpen(t, dir, testOptions())
			for _, link := range c.links {
				e := ofSession("s-a", nucleus.KindIntent)
				if link >= 0 {
					e.Prev = &link
				}
				appendForged(t, l, e)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			report, err := Verify(dir, VerifyOptions{Key: testVerifier})
			if err != nil {
				t.Fatal(err)
			}
			got := map[int64]bool{}
			for _, p := range report.Problems {
				if p.Kind != WrongLink {
					t.Errorf("%s", p)
				}
				got[p.Index] = true
			}
			if found := slices.Sorted(maps.Keys(got)); !slices.Equal(found, c.wrong) {
				t.Errorf("wrong links at %d, want %d", found, c.wrong)
			}
		})
	}
}

// appendForged appends an entry with the link that it comes with.
func appendForged(t *testing.T, l *Log, e nucleus.Entry) {
	t.Helper()
	link := e.Prev
	l.links = &links{last: map[string]int64{}}
	if link != nil {
		l.links.last[e.Session] = *link
	}
	appendAll(t, l, e)
	l.links = nil
}
