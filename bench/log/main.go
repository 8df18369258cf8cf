// Command log measures the log beside tessera's POSIX driver, in one run on one
// disk, and prints the lines of a report. Its tests hand logs of ours to tessera's
// fsck and to a witness of others. It is a module of its own, so that theirs stay
// out of the product's.
//
//	cd bench/log && go run . && go test .
package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"k8s.io/klog/v2"

	"cal/audit"
	"cal/nucleus"
)

const origin = "cal.bench/log"

// An entry as the node writes it, of some 450 bytes.
func entry(i int) nucleus.Entry {
	sum := sha256.Sum256(fmt.Append(nil, i))
	kind, permit := nucleus.KindIntent, fmt.Sprintf("q-%026d", i/2)
	if i%2 == 1 {
		kind = nucleus.KindOutcome
	}
	return nucleus.Entry{
		Kind: kind, Pod: "p-xgvre4zojk", Session: fmt.Sprintf("s-%026d", i%97), Actor: "agent", Op: nucleus.ReadFiles,
		Digest: fmt.Sprintf("%x", sum), Args: json.RawMessage(fmt.Sprintf(`{"files":[{"path":"greeter/src/file-%d.go"}],"op":"read_files"}`, i)),
		Verdict: nucleus.Allow, Rule: "operations.read_files", Exposure: []string{"private"}, Permit: permit,
	}
}

func main() {
	entries := flag.Int("entries", 1000000, "entries of the log that is verified")
	rounds := flag.Int("rounds", 5, "rounds of each writer; the median counts")
	each := flag.Duration("each", 3*time.Second, "length of a round")
	dir := flag.String("dir", "", "directory on the disk to measure (default: a temporary one)")
	check := flag.String("verify", "", "verify this log and exit")
	key := flag.String("key", "", "its verifier key")
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard) // tessera's
	part := flag.String("only", "", "write or verify: that part alone")
	flag.Parse()
	var err error
	if *check != "" {
		err = verify(*check, *key)
	} else {
		err = measure(*dir, *part, *entries, *rounds, *each)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "log:", err)
		os.Exit(1)
	}
}

func verify(dir, key string) error {
	r, err := audit.Verify(dir, audit.VerifyOptions{Key: key})
	if err == nil && !r.OK() {
		err = fmt.Errorf("%v", r.Problems)
	}
	if err == nil {
		fmt.Println(r.Size, r.Bytes)
	}
	return err
}

func measure(dir, part string, entries, rounds int, each time.Duration) error {
	parent, err := os.MkdirTemp(dir, "log-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(parent)
	if part != "verify" {
		if err := measureWriting(parent, rounds, each); err != nil {
			return err
		}
	}
	if part != "write" {
		return measureVerifying(parent, entries)
	}
	return nil
}

// sample is what one round of one contender took.
type sample struct {
	rate     float64 // a second
	p50, p99 float64 // ms
}

// writer is one contender: append must return when the entry is durable.
type writer struct {
	name    string
	clients int
	open    func(dir string) (append func(i int) error, done func() error, err error)
}

func measureWriting(parent string, rounds int, each time.Duration) error {
	contenders := []writer{
		{"bare write and fdatasync", 1, openBare},
		{"cal", 1, openOurs}, {"tessera, POSIX", 1, openTessera},
		{"cal", 64, openOurs}, {"tessera, POSIX", 64, openTessera},
	}
	samples := make([][]sample, len(contenders))
	for round := range rounds + 1 {
		for i, c := range contenders {
			s, err := c.run(filepath.Join(parent, fmt.Sprintf("%d-%d", round, i)), each)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if round > 0 {
				samples[i] = append(samples[i], s)
			}
		}
	}
	fmt.Printf("Appends that return when they are durable, entries of some 450 bytes; medians of %d rounds of %v that take turns. Ours are under a signed checkpoint by then,\n", rounds, each)
	fmt.Print("and the log is published every second beside them; tessera's have a place and a tree, its checkpoint follows (batches of 256 or 1 ms).\n\n")
	fmt.Println("| | writers | entries/s | p50 ms | p99 ms | p50 in bare syncs |")
	fmt.Println("|---|---|---|---|---|---|")
	bare := pick(samples[0], func(s sample) float64 { return s.p50 })
	for i, c := range contenders {
		p50 := pick(samples[i], func(s sample) float64 { return s.p50 })
		fmt.Printf("| %s | %d | %.0f | %.3f | %.2f | %.2f |\n", c.name, c.clients,
			pick(samples[i], func(s sample) float64 { return s.rate }), p50, pick(samples[i], func(s sample) float64 { return s.p99 }), p50/bare)
	}
	return nil
}

// pick is the median of one figure.
func pick(samples []sample, of func(sample) float64) float64 {
	var all []float64
	for _, s := range samples {
		all = append(all, of(s))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func (w writer) run(dir string, each time.Duration) (sample, error) {
	appendOne, done, err := w.open(dir)
	if err != nil {
		return sample{}, err
	}
	var mu sync.Mutex
	var all []float64
	var failed error
	var group sync.WaitGroup
	next := make(chan int)
	started := time.Now()
	for range w.clients {
		group.Go(func() {
			var took []float64
			for i := range next {
				began := time.Now()
				if err := appendOne(i); err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
				}
				took = append(took, float64(time.Since(began).Microseconds())/1000)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
		})
	}
	for i := 0; time.Since(started) < each; i++ {
		next <- i
	}
	close(next)
	group.Wait()
	elapsed := time.Since(started)
	if err := done(); err != nil {
		return sample{}, err
	}
	slices.Sort(all)
	return sample{float64(len(all)) / elapsed.Seconds(), all[len(all)/2], all[len(all)*99/100]}, failed
}

func openBare(dir string) (func(int) error, func() error, error) {
	f, err := os.Create(dir)
	if err != nil {
		return nil, nil, err
	}
	record := make([]byte, 700) // about what the journal gets for one entry
	return func(int) error {
		if _, err := f.Write(record); err != nil {
			return err
		}
		return syscall.Fdatasync(int(f.Fd()))
	}, f.Close, nil
}

var key = func() ed25519.PrivateKey {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}()

func openOurs(dir string) (func(int) error, func() error, error) {
	l, err := audit.Open(dir, audit.Options{Origin: origin, Key: key, Link: true})
	if err != nil {
		return nil, nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	var publishing sync.WaitGroup
	publishing.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				_ = l.Publish() // an error refuses the next append
			}
		}
	})
	return func(i int) error {
			_, err := l.Append(entry(i))
			return err
		}, func() error {
			stop()
			publishing.Wait()
			return l.Close()
		}, nil
}

func openTessera(dir string) (func(int) error, func() error, error) {
	secret, _, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		return nil, nil, err
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		return nil, nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	driver, err := posix.New(ctx, posix.Config{Path: dir})
	if err != nil {
		stop()
		return nil, nil, err
	}
	options := tessera.NewAppendOptions().WithCheckpointSigner(signer).WithBatching(256, time.Millisecond).WithCheckpointInterval(time.Second)
	appender, shutdown, _, err := tessera.NewAppender(ctx, driver, options)
	if err != nil {
		stop()
		return nil, nil, err
	}
	return func(i int) error {
			raw, err := nucleus.Canonical(entry(i))
			if err != nil {
				return err
			}
			_, err = appender.Add(ctx, tessera.NewEntry(raw))()
			return err
		}, func() error {
			defer stop()
			return shutdown(ctx)
		}, nil
}

// fill appends n entries, a thousand to a sync: only their verification is timed.
func fill(dir string, n int) error {
	l, err := audit.Open(dir, audit.Options{Origin: origin, Key: key, Link: true})
	if err != nil {
		return err
	}
	defer l.Close()
	for from := 0; from < n; from += 1000 {
		var begun []*audit.Pending
		for i := from; i < min(n, from+1000); i++ {
			p, err := l.Begin(entry(i))
			if err != nil {
				return err
			}
			begun = append(begun, p)
		}
		for _, p := range begun {
			if _, err := p.Wait(); err != nil {
				return err
			}
		}
	}
	return l.Close()
}

func measureVerifying(parent string, n int) error {
	dir := filepath.Join(parent, "big")
	if err := fill(dir, n); err != nil {
		return err
	}
	disk, err := usage(dir)
	if err != nil {
		return err
	}
	var ours, theirs []float64
	var rss, bytes int64
	for range 3 {
		took, memory, output, err := child("--verify", dir, "--key", vkey())
		if err != nil {
			return err
		}
		var size int
		if _, err := fmt.Sscan(output, &size, &bytes); err != nil || size != n {
			return fmt.Errorf("verified %q, want %d entries: %w", output, n, err)
		}
		ours, rss = append(ours, took), max(rss, memory)
		started := time.Now()
		if err := check(context.Background(), dir, vkey(), 2); err != nil {
			return err
		}
		theirs = append(theirs, time.Since(started).Seconds())
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	fmt.Printf("\nA log of %d entries, %d MB of entries: verified from the directory and the key.\n\n", n, bytes/1e6)
	fmt.Println("| | s | ratio | RSS MB |")
	fmt.Println("|---|---|---|---|")
	fmt.Printf("| cal audit verify | %.2f | 1.00 | %d |\n", ours[1], rss/1e6)
	fmt.Printf("| tessera's fsck, two workers | %.2f | %.2f | |\n", theirs[1], theirs[1]/ours[1])
	fmt.Printf("\nThe directory takes %.3f times the entries' bytes on the disk.\n", float64(disk)/float64(bytes))
	return nil
}

// child runs this program again, for its time in seconds and its peak memory.
func child(args ...string) (took float64, rss int64, output string, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, 0, "", err
	}
	cmd := exec.Command(self, args...)
	cmd.Stderr = os.Stderr
	started := time.Now()
	out, err := cmd.Output()
	took = time.Since(started).Seconds()
	if err != nil {
		return 0, 0, "", err
	}
	usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	return took, usage.Maxrss * 1024, strings.TrimSpace(string(out)), nil
}

// usage is what a directory takes on the disk, in whole blocks.
func usage(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			total += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	return total, err
}

func vkey() string { return audit.VerifierKey(origin, key.Public().(ed25519.PublicKey)) }

// check is tessera's fsck over a directory, as its command runs it.
func check(ctx context.Context, dir, vkey string, workers uint) error {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return err
	}
	hashes := func(bundle []byte) ([][]byte, error) {
		b := &api.EntryBundle{}
		if err := b.UnmarshalText(bundle); err != nil {
			return nil, err
		}
		var all [][]byte
		for _, e := range b.Entries {
			all = append(all, rfc6962.DefaultHasher.HashLeaf(e))
		}
		return all, nil
	}
	return fsck.New(v.Name(), v, client.FileFetcher{Root: dir}, hashes, fsck.Opts{N: workers}).Check(ctx)
}
