package spent

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"cal/nucleus"
)

// A child uses grants g-0, g-1, ... and says so line by line until it is killed.
const childEnv = "SPENT_TEST_STORE"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		s, err := Open(path)
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		for i := 0; ; i++ {
			fmt.Println("start", i)
			fmt.Println(outcome(s.Use(grant(i))), i)
		}
	}
	os.Exit(m.Run())
}

func grant(i int) nucleus.Grant {
	return nucleus.Grant{ID: fmt.Sprintf("g-%d", i), Ask: "a-1", Pod: "p-1", Digest: "d", Expires: 9}
}

func outcome(err error) string {
	switch {
	case err == nil:
		return "first"
	case errors.Is(err, ErrUsed):
		return "again"
	}
	return "error " + err.Error()
}

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// The child is killed with SIGKILL at some step; whatever it was told stays so.
func TestUseOnceAcrossKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "odd ?name#%41.db")
	next := 0 // the first grant of which no child has been told
	for round := range 4 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+path)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		unsure := next // the last child may have used it and died before it said so
		stop := next + 7 + round
		last := -1 // started, no answer seen
		for lines.Scan() {
			var what string
			var i int
			if _, err := fmt.Sscan(lines.Text(), &what, &i); err != nil {
				t.Fatalf("child said %q", lines.Text())
			}
			switch {
			case what == "start":
				last = i
				if i == stop {
					if err := child.Process.Signal(syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}
				continue
			case what != "first" && what != "again", i < unsure && what != "again", i > unsure && what != "first":
				t.Errorf("round %d: grant %d is %q; those below %d were used", round, i, what, unsure)
			}
			next, last = max(next, i+1), -1
		}
		if err := child.Wait(); err == nil {
			t.Error("child ended by itself")
		}
		if last >= 0 {
			next = last // nobody can say: it may be used or not
		}
		s := open(t, path)
		for i := range next {
			if err := s.Use(grant(i)); !errors.Is(err, ErrUsed) {
				t.Errorf("round %d: grant %d after the kill: %v, want ErrUsed", round, i, err)
			}
		}
		_ = s.Close()
	}
	if next < 20 {
		t.Errorf("%d grants used over all rounds, want more", next)
	}
}

// Two stores on one file, many callers: one of them is first.
func TestUseConcurrent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "spent.db")
	stores := []*Store{open(t, path), open(t, path)}
	got := make(chan string, 100)
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() { got <- outcome(stores[i%2].Use(grant(1))) })
	}
	wg.Wait()
	close(got)
	count := map[string]int{}
	for o := range got {
		count[o]++
	}
	if count["first"] != 1 || count["again"] != 99 {
		t.Errorf("outcomes %v, want 1 first, 99 again", count)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("not a database. ", 500)), 0o600); err != nil {
		t.Fatal(err)
	}
	damaged := filepath.Join(dir, "damaged.db")
	s := open(t, damaged)
	for i := range 200 {
		if err := s.Use(grant(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(damaged)
	if err != nil || len(raw) < 3*4096 {
		t.Fatalf("%d bytes, %v", len(raw), err)
	}
	for i := 4096; i < len(raw); i++ {
		raw[i] = 0x5a
	}
	if err := os.WriteFile(damaged, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{garbage, damaged, dir, filepath.Join(dir, "none", "x.db")} {
		if s, err := Open(path); err == nil {
			_ = s.Close()
			t.Errorf("Open(%s) succeeded", path)
		}
	}
}

func TestUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "spent.db")
	s := open(t, path)
	if err := s.Use(nucleus.Grant{}); err == nil {
		t.Error("a grant without id was used")
	}
	if got := outcome(s.Use(grant(1))); got != "first" {
		t.Error(got)
	}
	other := grant(1)
	other.Ask, other.Pod = "a-2", "p-2"
	if got := outcome(s.Use(other)); got != "again" {
		t.Errorf("the same id for another ask: %s, want again", got)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := outcome(s.Use(grant(2))); !strings.HasPrefix(got, "error") {
		t.Errorf("on a closed store: %s, want an error", got)
	}
}

func BenchmarkUse(b *testing.B) {
	s, err := Open(filepath.Join(b.TempDir(), "spent.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for i := 0; b.Loop(); i++ {
		if err := s.Use(grant(i)); err != nil {
			b.Fatal(err)
		}
	}
}

// The grants of one ask are used together: where one was used before, none is.
func TestUseTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "spent.db")
	s := open(t, path)
	if err := s.Use(grant(1), grant(2), grant(3)); err != nil {
		t.Fatal(err)
	}
	for _, grants := range [][]nucleus.Grant{{grant(4), grant(2)}, {grant(4), grant(5), grant(1)}, {grant(4), grant(4)}} {
		if err := s.Use(grants...); !errors.Is(err, ErrUsed) {
			t.Errorf("%v: %v, want ErrUsed", grants, err)
		}
	}
	if err := s.Use(grant(4), nucleus.Grant{}); err == nil {
		t.Error("a grant without an id was used")
	}
	if err := s.Use(); err == nil {
		t.Error("nothing was used")
	}
	_ = s.Close()
	if err := open(t, path).Use(grant(4), grant(5)); err != nil {
		t.Errorf("those beside a used one: %v", err)
	}
}

// A task has as many uses as it has, over all callers and openings.
func TestAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "spent.db")
	const most, callers = 7, 50
	stores := []*Store{open(t, path), open(t, path)}
	var mu sync.Mutex
	var got []int
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			n, err := stores[i%2].Again("a-1", most, fmt.Sprint("r-", i))
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				got = append(got, n)
			case !errors.Is(err, ErrUsed):
				t.Error(err)
			}
		})
	}
	all.Wait()
	slices.Sort(got)
	if !slices.Equal(got, []int{1, 2, 3, 4, 5, 6, 7}) {
		t.Errorf("uses %v of %d", got, most)
	}
	if n, err := open(t, path).Again("a-2", 1, "r-1"); n != 1 || err != nil {
		t.Errorf("another task: %d, %v", n, err)
	}
}
