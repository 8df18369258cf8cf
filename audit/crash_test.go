package audit

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cal/nucleus"
)

// hostile is a disk on which one operation goes wrong.
type hostile struct {
	FS
	mu    sync.Mutex
	at    int    // the operation that goes wrong, counted from 0; negative: none
	mode  string // how, see modes
	count int
	names []string // the operations so far

	unsynced int64 // bytes of the journal that a power cut would take
}

// The ways to go wrong. A disk that is full afterwards is full for writes of all
// kinds until it is mended.
const (
	fails     = "fails"
	persisted = "fails but persisted"
	half      = "half of it is written"
	full      = "fails, and every write after it"
)

var errDisk = errors.New("input/output error")

func (h *hostile) wrong(name string, writes bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.names = append(h.names, name)
	h.count++
	return h.at >= 0 && (h.count-1 == h.at || h.mode == full && writes && h.count-1 > h.at)
}

func (h *hostile) mend() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.at = -1
}

func (h *hostile) Names() ([]string, error) {
	if h.wrong("list", false) {
		return nil, errDisk
	}
	return h.FS.Names()
}

func (h *hostile) Partials() ([]string, error) {
	if h.wrong("list tile", false) {
		return nil, errDisk
	}
	return h.FS.Partials()
}

func (h *hostile) ReadFile(name string, limit int64) ([]byte, error) {
	if h.wrong("read "+name, false) {
		return nil, errDisk
	}
	return h.FS.ReadFile(name, limit)
}

func (h *hostile) WriteFile(name string, data []byte) error {
	if !h.wrong("write file "+name, true) {
		return h.FS.WriteFile(name, data)
	}
	if h.mode == persisted {
		if err := h.FS.WriteFile(name, data); err != nil {
			return err
		}
	}
	return errDisk
}

func (h *hostile) Remove(name string) error {
	if !h.wrong("remove "+name, true) {
		return h.FS.Remove(name)
	}
	if h.mode == persisted {
		if err := h.FS.Remove(name); err != nil {
			return err
		}
	}
	return errDisk
}

func (h *hostile) Append(name string) (File, error) {
	if h.wrong("open "+name, false) {
		return nil, errDisk
	}
	f, err := h.FS.Append(name)
	if err != nil {
		return nil, err
	}
	h.unsynced = 0
	return &hostileFile{f, h}, nil
}

type hostileFile struct {
	File
	h *hostile
}

func (f *hostileFile) Write(p []byte) (int, error) {
	wrong := f.h.wrong("append", true)
	if wrong && (f.h.mode == fails || f.h.mode == full) {
		return 0, errDisk
	}
	if wrong && f.h.mode == half {
		p = p[:len(p)/2]
	}
	n, err := f.File.Write(p)
	f.h.unsynced += int64(n)
	if wrong {
		return n, errDisk
	}
	return n, err
}

// Sync that fails loses what was written since the one before.
func (f *hostileFile) Sync() error {
	wrong := f.h.wrong("sync", true)
	if wrong && f.h.mode != persisted {
		file := f.File.(datasynced).File
		info, err := file.Stat()
		if err != nil {
			return err
		}
		lost := f.h.unsynced
		if f.h.mode == half {
			lost /= 2
		}
		if err := os.Truncate(file.Name(), info.Size()-lost); err != nil {
			return err
		}
		return errDisk
	}
	f.h.unsynced = 0
	if err := f.File.Sync(); err != nil || wrong {
		return errors.Join(err, errDisk)
	}
	return nil
}

// Each operation of a life with appends and publishing, each way to go wrong,
// mended in the running process and by a new one: what was acknowledged stays,
// in its place, and a log that failed says so until it is reopened.
func TestEveryOperationFails(t *testing.T) {
	operations, _ := failAt(t, -1, fails, false)
	if operations < 60 {
		t.Fatalf("only %d operations", operations)
	}
	failed := 0
	for _, mode := range []string{fails, persisted, half, full} {
		for at := range operations {
			for _, inProcess := range []bool{true, false} {
				if _, seen := failAt(t, at, mode, inProcess); seen {
					failed++
				}
			}
		}
	}
	if failed < operations { // the positive control: faults do reach the log
		t.Fatalf("%d operations went wrong and only %d failures were seen", operations, failed)
	}
}

// failAt lives a life in which one operation goes wrong, and reports how many
// operations it had and whether anybody was told.
func failAt(t *testing.T, at int, mode string, inProcess bool) (operations int, seen bool) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	disk, err := openFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	h := &hostile{FS: disk, at: at, mode: mode}
	life := func() string { return fmt.Sprintf("operation %d (%s) %s", at, h.names[max(at, 0)], mode) }
	o := testOptions()
	o.FS = h
	acknowledged := map[int64]string{}
	l, err := Open(dir, o)
	if err != nil {
		seen = true
		l = reopened(t, dir, life)
	}
	next := 0
	appendOne := func() error {
		name := fmt.Sprintf("e-%d", next)
		next++
		e, err := l.Append(nucleus.Entry{Kind: "log.x", Session: name})
		if err == nil {
			acknowledged[e.Seq] = name
			if got := readAll(t, dir, e.Seq); len(got) != 1 || got[0].Session != name {
				t.Errorf("%s: entry %d was acknowledged, a reader finds %v", life(), e.Seq, got)
			}
			if l.fs == FS(h) && h.unsynced != 0 {
				t.Errorf("%s: entry %d was acknowledged with %d bytes not synced", life(), e.Seq, h.unsynced)
			}
		}
		return err
	}
	mend := func(err error) {
		if err == nil {
			return
		}
		seen = true
		if !errors.Is(err, ErrFailed) || !errors.Is(err, errDisk) {
			t.Errorf("%s: %v, want ErrFailed and the cause", life(), err)
		}
		if err := appendOne(); !errors.Is(err, ErrFailed) {
			t.Errorf("%s: an append after the failure: %v", life(), err)
		}
		if mode == full {
			if err := l.Reopen(); err == nil {
				if err := appendOne(); !errors.Is(err, ErrFailed) {
					t.Errorf("%s: an append on a full disk: %v", life(), err)
				}
			}
		}
		h.mend()
		if inProcess {
			if err := l.Reopen(); err != nil {
				t.Fatalf("%s: reopen: %v", life(), err)
			}
			return
		}
		l.Close()
		l = reopened(t, dir, life)
	}
	// What cannot be kept of a witness's word costs the log nothing.
	kept := func() {
		line, err := Cosign(l.Published(), "w.test", testWitness, time.Unix(1700000000, 0))
		if err == nil {
			err = l.Keep(append(l.Published(), line...))
		}
		if err == nil {
			return
		}
		seen = true
		if !errors.Is(err, errDisk) || errors.Is(err, ErrFailed) {
			t.Errorf("%s: keeping a cosigned checkpoint: %v", life(), err)
		}
		h.mend()
	}
	for _, n := range []int{3, 2, 0, 4} {
		for range n {
			mend(appendOne())
		}
		mend(l.Publish())
		kept()
	}
	mend(appendOne())
	if err := l.Close(); err != nil {
		seen = true
		h.mend()
		reopened(t, dir, life).Close()
	}
	all := readAll(t, dir, 0)
	for seq, name := range acknowledged {
		if seq >= int64(len(all)) || all[seq].Session != name {
			t.Errorf("%s: entry %d (%s) was acknowledged and is not there", life(), seq, name)
		}
	}
	if len(acknowledged) < 8 {
		t.Errorf("%s: only %d entries were acknowledged", life(), len(acknowledged))
	}
	if r := mustVerify(t, dir, nil); !r.OK() {
		t.Errorf("%s: %v", life(), r.Problems)
	}
	return h.count, seen
}

// reopened opens the directory on a healthy disk.
func reopened(t *testing.T, dir string, life func() string) *Log {
	t.Helper()
	l, err := Open(dir, testOptions())
	if err != nil {
		t.Fatalf("%s: %v", life(), err)
	}
	return l
}

// A crash that leaves any part of the last append on the disk: what came before
// is kept, and the part is told of by an entry.
func TestTornAtEveryByte(t *testing.T) {
	dir := makeCrashed(t, 3, 3)
	whole := contents(t, dir)[journalName]
	j, err := parseJournal([]byte(whole), nil)
	if err != nil || len(j.records) != 3 {
		t.Fatal(err, len(j.records))
	}
	last := len(whole) - frameHeader - 4 - len(j.records[2].checkpoint) - 2 - len(j.records[2].entries[0])
	for cut := last; cut < len(whole); cut++ {
		fills := []string{""}
		if cut%8 == 0 { // a file system that knew the size before it had the bytes
			fills = append(fills, strings.Repeat("\x00", len(whole)-cut), strings.Repeat("\x00", 4096))
		}
		for _, fill := range fills {
			torn := filepath.Join(t.TempDir(), "torn")
			copyDir(t, dir, torn)
			write(t, filepath.Join(torn, journalName), whole[:cut]+fill)
			tail := len(whole[last:cut] + fill)
			if tail > 0 {
				detected(t, torn, fmt.Sprintf("%d bytes of a torn append", tail))
			}
			l, err := Open(torn, testOptions())
			if err != nil {
				t.Fatalf("cut at %d, %d zeros: %v", cut-last, len(fill), err)
			}
			want := int64(5)
			if tail > 0 {
				want++
			}
			if got, err := l.Append(entryNumber(9)); err != nil || got.Seq != want {
				t.Fatalf("cut at %d: entry %d, %v; want %d", cut-last, got.Seq, err, want)
			}
			l.Close()
			wantOK(t, torn, nil, want+1)
			if tail == 0 {
				continue
			}
			mark := readAll(t, torn, 5)[0]
			var data tornData
			if err := json.Unmarshal(mark.Data, &data); err != nil || mark.Kind != nucleus.KindLogTorn {
				t.Fatalf("cut at %d: %+v, %v", cut-last, mark, err)
			}
			if data.Bytes != tail || !strings.HasPrefix(whole[last:cut]+fill, string(data.Head)) {
				t.Fatalf("cut at %d: the mark says %d bytes, want %d", cut-last, data.Bytes, tail)
			}
		}
	}
}

// Damage that is no torn write is not mended: opening refuses.
func TestDamagedJournalIsRefused(t *testing.T) {
	dir := makeCrashed(t, 3, 3)
	whole := contents(t, dir)[journalName]
	j, err := parseJournal([]byte(whole), nil)
	if err != nil {
		t.Fatal(err)
	}
	last := len(whole) - frameHeader - 4 - len(j.records[2].checkpoint) - 2 - len(j.records[2].entries[0])
	for i := range last {
		damaged := []byte(whole)
		damaged[i] ^= 0x10
		write(t, filepath.Join(dir, journalName), string(damaged))
		if l, err := Open(dir, testOptions()); err == nil {
			l.Close()
			t.Fatalf("byte %d of %d changed, and it opened", i, last)
		}
		if now := contents(t, dir)[journalName]; now != string(damaged) {
			t.Fatalf("byte %d: the refused open wrote", i)
		}
	}
	write(t, filepath.Join(dir, journalName), whole)
	mustOpen(t, dir, testOptions()).Close()
	wantOK(t, dir, nil, 6)
}

// A record changed by one who knows the format: its sums are right, and its
// signature is one that the key once made.
func TestForgedRecord(t *testing.T) {
	dir := makeCrashed(t, 3, 3)
	whole := contents(t, dir)[journalName]
	j, err := parseJournal([]byte(whole), nil)
	if err != nil {
		t.Fatal(err)
	}
	for n, r := range j.records {
		start, err := journalStart(base{Checkpoint: string(j.note), Open: j.open})
		if err != nil {
			t.Fatal(err)
		}
		forged := start
		for i, other := range j.records {
			var bundle []byte
			for _, raw := range other.entries {
				if i == n {
					raw = []byte(strings.Replace(string(raw), "s-1", "s-2", 1))
				}
				bundle = appendBundle(bundle, raw)
			}
			forged = append(forged, journalRecord(other.checkpoint, bundle)...)
		}
		write(t, filepath.Join(dir, journalName), string(forged))
		detected(t, dir, fmt.Sprintf("record %d forged", n))
		if l, err := Open(dir, testOptions()); err == nil || !strings.Contains(err.Error(), "root") {
			t.Errorf("record %d of %d entries forged: %v", n, r.says.Size, err)
			if err == nil {
				l.Close()
			}
		}
	}
	write(t, filepath.Join(dir, journalName), whole)
	wantOK(t, dir, nil, 6)
}

// TestKilled kills a process with many writers, again and again, on one log.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("AUDIT_TEST_CHILD"); dir != "" {
		killedChild(dir)
		return
	}
	dir := filepath.Join(t.TempDir(), "log")
	acknowledged := map[int64]string{}
	for round := range 12 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "AUDIT_TEST_CHILD="+dir, fmt.Sprintf("AUDIT_TEST_ROUND=%d", round))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines, n := bufio.NewReader(out), 0
		for {
			line, err := lines.ReadString('\n')
			if err == io.EOF {
				break // a line without its end was cut by the kill, too
			}
			var seq int64
			var name string
			if _, err := fmt.Sscan(line, &seq, &name); err != nil {
				t.Fatalf("child said %q", line)
			}
			acknowledged[seq] = name
			if n++; n == 40+17*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		err = cmd.Wait()
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Fatalf("child ended by itself: %v", err)
		}
		// The lock went with the process; whatever was in flight is whole or marked.
		l := mustOpen(t, dir, testOptions())
		kept := l.Checkpoint()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		r := mustVerify(t, dir, kept)
		if !r.OK() {
			t.Fatalf("round %d: %v", round, r.Problems)
		}
		all := readAll(t, dir, 0)
		for seq, name := range acknowledged {
			if seq >= int64(len(all)) || all[seq].Session != name {
				t.Fatalf("round %d: entry %d (%s) was acknowledged and is not there", round, seq, name)
			}
		}
	}
}

func killedChild(dir string) {
	l, err := Open(dir, testOptions())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for w := range 8 {
		go func() {
			for i := 0; ; i++ {
				name := fmt.Sprintf("%s-%d-%d", os.Getenv("AUDIT_TEST_ROUND"), w, i)
				e, err := l.Append(nucleus.Entry{Kind: "log.x", Session: name})
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				fmt.Printf("%d %s\n", e.Seq, name)
			}
		}()
	}
	for {
		if err := l.Publish(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
