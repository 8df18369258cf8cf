package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"cal/internal/durable"
	"cal/nucleus"
)

func TestAppendReadVerify(t *testing.T) {
	// Sizes around the edges of tiles; 66,000 reaches level 2 and is left to the
	// long test.
	for _, n := range []int{0, 1, 2, 255, 256, 257, 513} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			l := mustOpen(t, dir, testOptions())
			appendEntries(t, l, 0, n)
			wantOK(t, dir, l.Checkpoint(), int64(n)) // while it is open
			kept := l.Checkpoint()
			root := l.Root()
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			r := wantOK(t, dir, kept, int64(n))
			if r.Root != root.String() || r.Published != int64(n) {
				t.Fatalf("report %+v, want root %s, all published", r, root)
			}
			all := readAll(t, dir, 0)
			if len(all) != n {
				t.Fatalf("read %d entries, want %d", len(all), n)
			}
			for i, e := range all {
				if e.Seq != int64(i) || e.Time != "2023-11-14T22:13:20.000000005Z" || string(e.Args) != fmt.Sprintf(`{"path":"file-%d"}`, i) {
					t.Fatalf("entry %d: %+v", i, e)
				}
			}
			if n > 0 {
				if tail := readAll(t, dir, int64(n)-1); len(tail) != 1 || tail[0].Seq != int64(n)-1 {
					t.Fatalf("the last entry: %+v", tail)
				}
			}
		})
	}
}

// A clean open writes nothing, and what comes after it belongs to the same tree.
func TestReopenedLogGoesOn(t *testing.T) {
	dir := makeLog(t, 0)
	for from := 0; from < 600; from += 37 {
		before := contents(t, dir)
		l := mustOpen(t, dir, testOptions())
		if after := contents(t, dir); !maps.Equal(before, after) {
			t.Fatalf("opening at %d changed the directory", from)
		}
		if l.Size() != int64(from) {
			t.Fatalf("size %d, want %d", l.Size(), from)
		}
		appendEntries(t, l, from, 37)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		wantOK(t, dir, nil, int64(from+37))
	}
}

func TestManyWriters(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	const writers, each = 32, 40
	seen := make([][]int64, writers)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				e := entryNumber(i)
				e.Actor = fmt.Sprintf("writer-%d", w)
				got, err := l.Append(e)
				if err != nil {
					t.Error(err)
					return
				}
				cp, err := ParseCheckpoint(l.Checkpoint(), testVerifier)
				if err != nil || cp.Size <= got.Seq {
					t.Errorf("entry %d returned before a checkpoint had it: %v, %v", got.Seq, cp, err)
				}
				seen[w] = append(seen[w], got.Seq)
				if i%16 == 15 {
					if err := l.Publish(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	wantOK(t, dir, l.Checkpoint(), writers*each)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	all := readAll(t, dir, 0)
	for w, seqs := range seen {
		if !slices.IsSorted(seqs) {
			t.Errorf("writer %d: its entries are out of order: %v", w, seqs)
		}
		for _, seq := range seqs {
			if want := fmt.Sprintf("writer-%d", w); all[seq].Actor != want {
				t.Errorf("entry %d is of %s, want %s", seq, all[seq].Actor, want)
			}
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	defer l.Close()
	appendEntries(t, l, 0, 2)
	before := contents(t, dir)
	text := func(s string) json.RawMessage { raw, _ := json.Marshal(s); return raw }
	for name, e := range map[string]nucleus.Entry{
		"no kind":               {},
		"kind not UTF-8":        {Kind: "log.\xff"},
		"pod not UTF-8":         {Kind: "log.x", Pod: "\xc3\x28"},
		"grant not UTF-8":       {Kind: "log.x", Grants: []string{"ok", "\x80"}},
		"exposure not UTF-8":    {Kind: "log.x", Exposure: []string{"\x80"}},
		"data not UTF-8":        {Kind: "log.x", Data: json.RawMessage("\"\xff\"")},
		"data not JSON":         {Kind: "log.x", Data: json.RawMessage("{")},
		"data a lone surrogate": {Kind: "log.x", Data: json.RawMessage(`"\ud800"`)},
		"data a huge integer":   {Kind: "log.x", Data: json.RawMessage(`9007199254740993`)},
		"data twice a key":      {Kind: "log.x", Data: json.RawMessage(`{"a":1,"a":2}`)},
		"64 KiB":                {Kind: "log.x", Data: text(strings.Repeat("x", 65536))},
		"10 MB":                 {Kind: "log.x", Data: text(strings.Repeat("x", 10<<20))},
	} {
		if _, err := l.Append(e); err == nil || errors.Is(err, ErrFailed) {
			t.Errorf("%s: %v, want a refusal", name, err)
		}
	}
	if !maps.Equal(before, contents(t, dir)) {
		t.Error("a refused entry wrote something")
	}
	// The largest entry that fits, and after it the next number.
	big := nucleus.Entry{Kind: "log.x"}
	probe := big
	probe.Seq, probe.Time, probe.Data = 2, "2023-11-14T22:13:20.000000005Z", text("")
	raw, err := encode(probe)
	if err != nil {
		t.Fatal(err)
	}
	big.Data = text(strings.Repeat("x", nucleus.MaxEntry-len(raw)))
	if got, err := l.Append(big); err != nil || got.Seq != 2 {
		t.Fatalf("an entry of %d bytes: %d, %v", nucleus.MaxEntry, got.Seq, err)
	}
	wantOK(t, dir, nil, 3)
}

func TestOpenRefuses(t *testing.T) {
	other := testOptions()
	other.Key = append([]byte{}, testKey...)
	other.Key = newKey(7)
	named := testOptions()
	named.Origin = "cal.test/other"
	for name, c := range map[string]struct {
		options Options
		spoil   func(dir string) error
		want    string
	}{
		"no key":       {Options{Origin: testOrigin}, nil, "log key has 0 bytes"},
		"no origin":    {Options{Key: testKey}, nil, "cannot name a log"},
		"a space":      {Options{Origin: "a b", Key: testKey}, nil, "cannot name a log"},
		"another key":  {other, nil, "bad signature"},
		"another name": {named, nil, "bad signature"},
		"a later format": {testOptions(), func(dir string) error {
			return os.WriteFile(filepath.Join(dir, journalName), []byte("cal-journal 2\nxxxxxxxxxxxx"), 0o600)
		}, "cal-journal 2"},
		"no journal": {testOptions(), func(dir string) error { return os.Remove(filepath.Join(dir, journalName)) }, "not a log"},
		"an older journal": {testOptions(), func(dir string) error {
			start, _ := os.ReadFile(filepath.Join(dir, "older"))
			return os.WriteFile(filepath.Join(dir, journalName), start, 0o600)
		}, "truncated"},
		"a tile is gone":      {testOptions(), func(dir string) error { return os.Remove(filepath.Join(dir, "tile/0/000.p/9")) }, "no such file"},
		"a tile is changed":   {testOptions(), flipIn("tile/0/000.p/9", 5), "root"},
		"a bundle is changed": {testOptions(), flipIn("tile/entries/000.p/9", 5), "entry 0 is not the one"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			l := mustOpen(t, dir, testOptions())
			older, _ := os.ReadFile(filepath.Join(dir, journalName))
			appendEntries(t, l, 0, 9)
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "older"), older, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.spoil != nil {
				if err := c.spoil(dir); err != nil {
					t.Fatal(err)
				}
			}
			before := contents(t, dir)
			l, err := Open(dir, c.options)
			if err == nil {
				l.Close()
				t.Fatal("it opened")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %q", err, c.want)
			}
			if !maps.Equal(before, contents(t, dir)) {
				t.Error("a refused open wrote something")
			}
		})
	}
}

func flipIn(name string, at int) func(string) error {
	return func(dir string) error {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		data[at] ^= 1
		return os.WriteFile(filepath.Join(dir, name), data, 0o600)
	}
}

// A directory that holds something else is left alone.
func TestOpenNotALog(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.txt"), []byte("years of work"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, testOptions()); err == nil || !strings.Contains(err.Error(), "not a log: it holds thesis.txt") {
		t.Fatal(err)
	}
}

func TestSecondOpener(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	if _, err := Open(dir, testOptions()); !errors.Is(err, durable.ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Fatalf("%v, want ErrLocked with the directory", err)
	}
	appendEntries(t, l, 0, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(entryNumber(1)); !errors.Is(err, ErrClosed) {
		t.Fatalf("append after close: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	l = mustOpen(t, dir, testOptions())
	l.Close()
}

func TestOpenIntents(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	intent := func(permit string) {
		t.Helper()
		if _, err := l.Append(nucleus.Entry{Kind: nucleus.KindIntent, Permit: permit}); err != nil {
			t.Fatal(err)
		}
	}
	outcome := func(permit string) {
		t.Helper()
		if _, err := l.Append(nucleus.Entry{Kind: nucleus.KindOutcome, Permit: permit, Status: nucleus.OutcomeDone}); err != nil {
			t.Fatal(err)
		}
	}
	open := func() string {
		var permits []string
		for _, e := range l.OpenIntents() {
			permits = append(permits, fmt.Sprintf("%s@%d", e.Permit, e.Seq))
		}
		return strings.Join(permits, " ")
	}
	intent("a")
	intent("b")
	intent("") // refused: nothing will come of it
	for i := range 300 {
		intent(fmt.Sprintf("x%d", i))
		outcome(fmt.Sprintf("x%d", i))
	}
	intent("c")
	outcome("b")
	if err := l.Publish(); err != nil {
		t.Fatal(err)
	}
	intent("d")
	want := "a@0 c@603 d@605"
	if got := open(); got != want {
		t.Fatalf("%q, want %q", got, want)
	}
	// As a crash leaves it, and after a clean close.
	crashed := filepath.Join(t.TempDir(), "crashed")
	copyDir(t, dir, crashed)
	l.Close()
	for _, dir := range []string{crashed, dir, dir} {
		l = mustOpen(t, dir, testOptions())
		if got := open(); got != want {
			t.Fatalf("%q, want %q", got, want)
		}
		l.Close()
		if r := wantOK(t, dir, nil, 606); !slices.Equal(r.Intents, []int64{0, 603, 605}) {
			t.Fatalf("verify says %v", r.Intents)
		}
	}
	l = mustOpen(t, dir, testOptions())
	defer l.Close()
	outcome("a")
	outcome("c")
	outcome("d")
	if got := l.OpenIntents(); got == nil || len(got) != 0 {
		t.Fatalf("%v, want none", got)
	}
}

// The directory is whole for other readers at the size last published, however
// many appends came since; publishing again changes nothing.
func TestPublish(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	defer l.Close()
	for i := range 40 {
		appendEntries(t, l, i*20, 20)
		if err := l.Publish(); err != nil {
			t.Fatal(err)
		}
		before := contents(t, dir)
		if err := l.Publish(); err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(before, contents(t, dir)) {
			t.Fatal("publishing nothing wrote something")
		}
		size := (i + 1) * 20
		partials := 0
		for name := range before {
			if strings.Contains(name, ".p/") {
				partials++
			}
		}
		want := 0
		for n := size; n > 0; n >>= 8 {
			if n%256 > 0 {
				want++
			}
		}
		if size%256 > 0 {
			want++ // the bundle
		}
		if partials != want {
			t.Fatalf("%d entries: %d partial tiles, want %d: %v", size, partials, want, slices.Sorted(maps.Keys(before)))
		}
		if r := wantOK(t, dir, nil, int64(size)); r.Published != int64(size) {
			t.Fatalf("published %d, want %d", r.Published, size)
		}
	}
}

// A journal does not grow without bound when nobody publishes.
func TestLongJournalIsPublished(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	defer l.Close()
	text, _ := json.Marshal(strings.Repeat("x", 60000))
	for range 60 {
		if _, err := l.Append(nucleus.Entry{Kind: "log.x", Data: text}); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(dir, journalName))
		if err != nil || info.Size() > journalBytes+100000 {
			t.Fatalf("journal of %d bytes, %v", info.Size(), err)
		}
	}
	if r := wantOK(t, dir, nil, 60); r.Published == 0 {
		t.Fatal("nothing was published")
	}
}

// counting counts what is done to the journal.
type counting struct {
	FS
	writes, syncs int
	fail          error // of the next sync
}

type countingFile struct {
	File
	fs *counting
}

func (c *counting) Append(name string) (File, error) {
	f, err := c.FS.Append(name)
	return countingFile{f, c}, err
}

func (f countingFile) Write(p []byte) (int, error) {
	f.fs.writes++
	return f.File.Write(p)
}

func (f countingFile) Sync() error {
	f.fs.syncs++
	if err := f.fs.fail; err != nil {
		f.fs.fail = nil
		return err
	}
	return f.File.Sync()
}

func openCounting(t *testing.T, dir string) (*Log, *counting) {
	t.Helper()
	under, err := openFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := &counting{FS: under}
	o := testOptions()
	o.FS = c
	return mustOpen(t, dir, o), c
}

// Begin fixes the order and writes nothing; those that have begun share one record
// and one sync, whoever waits first, and none is durable before it.
func TestBegin(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l, disk := openCounting(t, dir)
	const n = 5
	var begun []*Pending
	for i := range n {
		if got := l.Next(); got != int64(i) {
			t.Errorf("next is %d, want %d", got, i)
		}
		p, err := l.Begin(entryNumber(i))
		if err != nil {
			t.Fatal(err)
		}
		begun = append(begun, p)
	}
	if l.Size() != 0 || disk.writes != 0 || disk.syncs != 0 {
		t.Errorf("begun only: size %d, %d writes, %d syncs", l.Size(), disk.writes, disk.syncs)
	}
	var waiters sync.WaitGroup
	for i, p := range slices.Backward(begun) {
		waiters.Go(func() {
			e, err := p.Wait()
			if err != nil || e.Seq != int64(i) {
				t.Errorf("entry %d: %+v, %v", i, e, err)
			}
			if l.Size() != n {
				t.Errorf("entry %d is said to be durable, the size is %d", i, l.Size())
			}
		})
	}
	waiters.Wait()
	if disk.writes != 1 || disk.syncs != 1 {
		t.Errorf("%d writes and %d syncs for %d entries, want one", disk.writes, disk.syncs, n)
	}
	appendEntries(t, l, n, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for i, e := range readAll(t, dir, 0) {
		if string(e.Args) != fmt.Sprintf(`{"path":"file-%d"}`, i) {
			t.Errorf("entry %d: %s", i, e.Args)
		}
	}
	wantOK(t, dir, nil, n+1)
}

// A sync that fails fails everyone who has begun, and nobody can begin after it
// before the log has been read anew. What began before that is not written then.
func TestBegunAndFailed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l, disk := openCounting(t, dir)
	appendEntries(t, l, 0, 3)
	var begun []*Pending
	for i := range 3 {
		p, err := l.Begin(entryNumber(i))
		if err != nil {
			t.Fatal(err)
		}
		begun = append(begun, p)
	}
	disk.fail = errors.New("no")
	for _, p := range begun {
		if _, err := p.Wait(); !errors.Is(err, ErrFailed) {
			t.Errorf("got %v, want ErrFailed", err)
		}
	}
	if _, err := l.Begin(entryNumber(9)); !errors.Is(err, ErrFailed) {
		t.Errorf("Begin after it: %v", err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	late, err := l.Begin(entryNumber(9))
	if err != nil {
		t.Fatal(err)
	}
	size := l.Size()
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	if _, err := late.Wait(); !errors.Is(err, ErrFailed) {
		t.Errorf("begun before Reopen: %v, want ErrFailed", err)
	}
	if l.Size() != size {
		t.Errorf("size %d, want %d", l.Size(), size)
	}
	appendEntries(t, l, int(size), 2) // what a sync failed for may have turned up
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wantOK(t, dir, nil, size+2)
}

// gated is a disk whose syncs wait for the test.
type gated struct {
	FS
	asked chan int64 // the size of the journal when a sync begins
	go_   chan error
}

type gatedFile struct {
	File
	g       *gated
	written int64
}

func (g *gated) Append(name string) (File, error) {
	f, err := g.FS.Append(name)
	return &gatedFile{File: f, g: g}, err
}

func (f *gatedFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	f.written += int64(n)
	return n, err
}

func (f *gatedFile) Sync() error {
	f.g.asked <- f.written
	if err := <-f.g.go_; err != nil {
		return err
	}
	return f.File.Sync()
}

// gatedLog opens a new log on such a disk.
func gatedLog(t *testing.T) (dir string, disk *gated, l *Log) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "log")
	under, err := openFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	disk = &gated{FS: under, asked: make(chan int64), go_: make(chan error)}
	o := testOptions()
	o.FS = disk
	return dir, disk, mustOpen(t, dir, o)
}

// While a sync has not returned nobody is told that an entry is durable, neither those
// of its group nor those that come later; one sync then tells a whole group.
func TestNothingIsAcknowledgedBeforeItsSync(t *testing.T) {
	dir, disk, l := gatedLog(t)
	const writers = 64
	var told atomic.Int64
	var group sync.WaitGroup
	entered := make(chan struct{}, writers)
	begin := func(n int) {
		for i := range n {
			group.Go(func() {
				p, err := l.Begin(entryNumber(i))
				entered <- struct{}{}
				if err == nil {
					_, err = p.Wait()
				}
				if err != nil {
					t.Error(err)
				}
				told.Add(1)
			})
		}
		for range n {
			<-entered
		}
	}
	begin(1)
	<-disk.asked // the first one's sync has begun
	begin(writers - 1)
	if n, size := told.Load(), l.Size(); n != 0 || size != 0 {
		t.Errorf("before any sync: %d were told, the size is %d", n, size)
	}
	disk.go_ <- nil
	<-disk.asked // the others', one for all of them
	if n, size := told.Load(), l.Size(); n > 1 || size != 1 {
		t.Errorf("after one sync: %d were told, the size is %d", n, size)
	}
	disk.go_ <- nil
	group.Wait()
	if n, size := told.Load(), l.Size(); n != writers || size != writers {
		t.Errorf("after two syncs: %d were told, the size is %d", n, size)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wantOK(t, dir, nil, writers)
}

// What has begun while a sync was under way that then fails is not written after it: its
// record would stand behind bytes that nobody can vouch for.
func TestQueuedBehindAFailure(t *testing.T) {
	dir, disk, l := gatedLog(t)
	first := make(chan error)
	go func() {
		_, err := l.Append(entryNumber(0))
		first <- err
	}()
	<-disk.asked
	p, err := l.Begin(entryNumber(1))
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error, 1)
	go func() {
		_, err := p.Wait()
		second <- err
	}()
	disk.go_ <- errors.New("no")
	if err := <-first; !errors.Is(err, ErrFailed) {
		t.Errorf("the first: %v", err)
	}
	select {
	case err := <-second:
		if !errors.Is(err, ErrFailed) {
			t.Errorf("the one behind it: %v", err)
		}
	case <-disk.asked:
		t.Error("the one behind it was written")
		disk.go_ <- nil
		<-second
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r := mustVerify(t, dir, nil); !r.OK() || r.Size > 1 {
		t.Errorf("%d entries: %v", r.Size, r.Problems)
	}
}
