package audit

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/internal/durable"
)

// BenchmarkSync is the floor: one write and one fdatasync of the same size.
func BenchmarkSync(b *testing.B) {
	f, err := os.Create(filepath.Join(b.TempDir(), "f"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	record := make([]byte, 600)
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		start := time.Now()
		if _, err := f.Write(record); err != nil {
			b.Fatal(err)
		}
		if err := durable.Datasync(f); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	quantiles(b, took)
}

// BenchmarkAppend measures durable appends, publishing every second as an owner
// does.
func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			l := mustOpen(b, filepath.Join(b.TempDir(), "log"), testOptions())
			stop := make(chan struct{})
			var owner, wg sync.WaitGroup
			owner.Go(func() {
				tick := time.NewTicker(time.Second)
				defer tick.Stop()
				for {
					select {
					case <-stop:
						return
					case <-tick.C:
						if err := l.Publish(); err != nil {
							b.Error(err)
						}
					}
				}
			})
			var mu sync.Mutex
			var all []time.Duration
			b.ResetTimer()
			for w := range writers {
				wg.Go(func() {
					var took []time.Duration
					for i := w; i < b.N; i += writers {
						start := time.Now()
						if _, err := l.Append(entryNumber(i)); err != nil {
							b.Error(err)
							return
						}
						took = append(took, time.Since(start))
					}
					mu.Lock()
					all = append(all, took...)
					mu.Unlock()
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
			quantiles(b, all)
			close(stop)
			owner.Wait()
			if err := l.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func quantiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	for _, q := range []int{50, 99} {
		b.ReportMetric(float64(took[len(took)*q/100].Microseconds()), fmt.Sprintf("p%d-us", q))
	}
}

// BenchmarkVerify reports the time to verify one entry.
func BenchmarkVerify(b *testing.B) {
	const n = 100000
	dir := filepath.Join(b.TempDir(), "log")
	l := mustOpen(b, dir, testOptions())
	var wg sync.WaitGroup
	for w := range 64 {
		wg.Go(func() {
			for i := w; i < n; i += 64 {
				if _, err := l.Append(entryNumber(i)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	var size int64
	for _, content := range contents(b, dir) {
		size += int64(len(content))
	}
	for b.Loop() {
		r := mustVerify(b, dir, nil)
		if !r.OK() || r.Size != n {
			b.Fatal(r.Problems)
		}
		b.ReportMetric(float64(size)/float64(r.Bytes), "disk/entries")
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/entry")
}

func BenchmarkPublish(b *testing.B) {
	l := mustOpen(b, filepath.Join(b.TempDir(), "log"), testOptions())
	defer l.Close()
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		appendEntries(b, l, i, 1)
		b.StartTimer()
		if err := l.Publish(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkShownData is what the data of an entry costs before it is appended.
func BenchmarkShownData(b *testing.B) {
	for kind, data := range map[string]string{
		"model.call":      `{"api":"anthropic","done":true,"host":"api.example.org","id":"m-CQMGAV7EV7IW6BJKK4YWJ7WRPH","left":{"tokens":999000,"usd":4.5},"model":"a-model-4","status":200,"tokens":{"input":1200,"output":340},"took":1200345678,"usd":0.0123}`,
		"request.outcome": `{"kind":"failed","message":"write src/main.go: the file has changed since it was read: read it again"}`,
		"egress.open":     `{"address":"192.0.2.1:443","attempt":"eg-CQMGAV7EV7IW6BJKK4YWJ7WRPH","host":"registry.example.org","port":443,"via":"http"}`,
	} {
		b.Run(kind, func(b *testing.B) {
			for b.Loop() {
				shownData(kind, []byte(data))
			}
		})
	}
}

func BenchmarkShown(b *testing.B) {
	source, err := os.ReadFile("verify.go")
	if err != nil {
		b.Fatal(err)
	}
	for name, v := range map[string]any{
		"path": map[string]string{"path": "src/main.go"}, "256KB": map[string]string{"path": "x", "content": strings.Repeat(string(source), 1+(256<<10)/len(source))},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				Shown(v)
			}
		})
	}
}
