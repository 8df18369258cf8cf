package firecracker

import (
	"context"
	_ "embed"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

// serveFake returns a fake API and a client that speaks to it over a unix socket.
func serveFake(t *testing.T) (*fakeAPI, *api) {
	t.Helper()
	fake := newFakeAPI(t.TempDir(), "m-1")
	for _, name := range []string{"kernel", "initramfs", "root.erofs", "scratch.ext4"} {
		must(t, os.WriteFile(filepath.Join(fake.root, name), []byte(name), 0o600))
	}
	socket := filepath.Join(fake.root, "api")
	listener, err := net.Listen("unix", socket)
	must(t, err)
	server := httptest.NewUnstartedServer(fake)
	server.Listener.Close()
	server.Listener = listener
	server.Start()
	t.Cleanup(server.Close)
	return fake, newAPI(func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, "unix", socket) })
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// configure does all that comes before the start.
func configure(ctx context.Context, a *api) error {
	limit := &rateLimiter{Bandwidth: &tokenBucket{Size: 1 << 20, Burst: 1 << 30, Refill: 100}, Ops: &tokenBucket{Size: 1000, Refill: 100}}
	return errors.Join(
		a.setSerial(ctx, serialDevice{Path: "/console", Limit: &tokenBucket{Size: 1, Refill: 1}}),
		a.setMachine(ctx, machineConfig{2, 512}),
		a.setBoot(ctx, bootSource{"/kernel", "/initramfs", "console=ttyS0"}),
		a.addDrive(ctx, drive{ID: "root", Path: "/root.erofs", ReadOnly: true, Cache: "Unsafe"}),
		a.addDrive(ctx, drive{ID: "scratch", Path: "/scratch.ext4", Cache: "Writeback", Limit: limit}),
		a.setVsock(ctx, vsockDevice{3, "/vsock"}),
	)
}

// TestLife: each request that the driver knows, in the order in which they are allowed.
func TestLife(t *testing.T) {
	fake, a := serveFake(t)
	ctx := t.Context()
	state := func(want string) {
		t.Helper()
		if info, err := a.info(ctx); err != nil || info.State != want || info.ID != "m-1" || info.Version != Version {
			t.Errorf("%+v, %v, want state %q", info, err, want)
		}
	}
	state("Not started")
	must(t, configure(ctx, a))
	must(t, a.start(ctx))
	state("Running")
	must(t, a.pause(ctx))
	state("Paused")
	must(t, a.saveSnapshot(ctx, snapshotCreate{memoryInUse, "/s", "/m"}))
	must(t, a.resume(ctx))

	twin, b := serveFake(t)
	for _, name := range []string{"s", "m"} {
		must(t, os.Rename(filepath.Join(fake.root, name), filepath.Join(twin.root, name)))
	}
	must(t, b.setSerial(ctx, serialDevice{Path: "/console"}))
	must(t, b.loadSnapshot(ctx, snapshotLoad{"/s", memoryBackend{"File", "/m"}}))
	if info, err := b.info(ctx); err != nil || info.State != "Paused" {
		t.Errorf("after loading: %+v, %v", info, err)
	}
	must(t, b.resume(ctx))
}

// refusal is a request that must be refused, after others.
type refusal struct {
	first, then func(context.Context, *api) error
	want        string
}

func refusals() map[string]refusal {
	before := func(context.Context, *api) error { return nil }
	started := func(ctx context.Context, a *api) error { return errors.Join(configure(ctx, a), a.start(ctx)) }
	put := func(path string, body any) func(context.Context, *api) error {
		return func(ctx context.Context, a *api) error { return a.call(ctx, http.MethodPut, path, body, nil) }
	}
	save := func(ctx context.Context, a *api) error {
		return a.saveSnapshot(ctx, snapshotCreate{memoryInUse, "/s", "/m"})
	}
	load := func(ctx context.Context, a *api) error {
		return a.loadSnapshot(ctx, snapshotLoad{"/s", memoryBackend{"File", "/m"}})
	}
	add := func(d drive) func(context.Context, *api) error {
		return func(ctx context.Context, a *api) error { return a.addDrive(ctx, d) }
	}
	type object map[string]any
	return map[string]refusal{
		"pause before the start":     {before, func(ctx context.Context, a *api) error { return a.pause(ctx) }, "before starting"},
		"snapshot before the start":  {before, save, "before starting"},
		"start without a kernel":     {before, func(ctx context.Context, a *api) error { return a.start(ctx) }, "without kernel"},
		"start twice":                {started, func(ctx context.Context, a *api) error { return a.start(ctx) }, "after starting"},
		"a kernel after the start":   {started, func(ctx context.Context, a *api) error { return a.setBoot(ctx, bootSource{Kernel: "/kernel"}) }, "after starting"},
		"memory after the start":     {started, func(ctx context.Context, a *api) error { return a.setMachine(ctx, machineConfig{1, 256}) }, "after starting"},
		"a drive after the start":    {started, add(drive{ID: "x", Path: "/kernel", Cache: "Unsafe"}), "PCI is not enabled"},
		"snapshot while it runs":     {started, save, "running"},
		"load after configuring":     {configure, load, "not allowed after configuring"},
		"load what is not there":     {before, load, "no such file"},
		"a drive that is not there":  {before, add(drive{ID: "x", Path: "/x", Cache: "Unsafe"}), "no such file"},
		"a kernel that is not there": {before, func(ctx context.Context, a *api) error { return a.setBoot(ctx, bootSource{"/x", "", ""}) }, "kernel file cannot be opened"},
		"a bad drive id":             {before, add(drive{ID: "a-b", Path: "/kernel", Cache: "Unsafe"}), "alphanumeric"},
		"an unknown cache":           {before, add(drive{ID: "x", Path: "/kernel", Cache: "Sometimes"}), "deserializing"},
		"too many processors":        {before, func(ctx context.Context, a *api) error { return a.setMachine(ctx, machineConfig{33, 512}) }, ""},
		"10,000 processors":          {before, func(ctx context.Context, a *api) error { return a.setMachine(ctx, machineConfig{10_000, 512}) }, "deserializing"},
		"no memory":                  {before, func(ctx context.Context, a *api) error { return a.setMachine(ctx, machineConfig{1, 0}) }, "memory size"},
		"an unknown field":           {before, put("/vsock", object{"guest_cid": 3, "uds_path": "/v", "x": 1}), "unknown field `x`"},
		"a field too few":            {before, put("/vsock", object{"guest_cid": 3}), "missing field `uds_path`"},
		"a wrong type":               {before, put("/vsock", object{"guest_cid": "3", "uds_path": "/v"}), "deserializing"},
		"another drive in the body":  {before, put("/drives/a", drive{ID: "b", Path: "/kernel", Cache: "Unsafe"}), "does not match"},
		"an unknown path":            {before, put("/metadata", object{}), "Invalid request"},
		"an unknown action":          {before, put("/actions", object{"action_type": "Explode"}), "deserializing"},
		"no body":                    {before, put("/actions", nil), ""},
	}
}

// try holds a refusal against an API.
func (r refusal) try(t *testing.T, a *api) {
	t.Helper()
	must(t, r.first(t.Context(), a))
	err := r.then(t.Context(), a)
	var refused *apiError
	if !errors.As(err, &refused) || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(r.want)) {
		t.Errorf("got %v, want %q", err, r.want)
	}
}

// TestRefused: what the real one refuses is an error with its words; TestRealRefuses
// shows that the real one does.
func TestRefused(t *testing.T) {
	for name, r := range refusals() {
		t.Run(name, func(t *testing.T) {
			_, a := serveFake(t)
			r.try(t, a)
		})
	}
}

//go:embed api.go
var apiSource string

// TestNeverSent: the description knows requests that the driver must never make.
func TestNeverSent(t *testing.T) {
	for _, never := range []string{"network-interfaces", "mmds", "balloon", "vhost", "Uffd"} {
		if strings.Contains(apiSource, never) {
			t.Errorf("api.go speaks of %s", never)
		}
	}
}

// TestStrangeAnswers: who answers may be in the guest's hands.
func TestStrangeAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"a body without end": {func(w http.ResponseWriter, _ *http.Request) {
			for range 1 << 12 {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		}, "firecracker"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://localhost/x", http.StatusFound)
		}, "redirects"},
		"no JSON": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("x")) }, "invalid character"},
		"control sequences": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(500)
			_, _ = w.Write([]byte("\x1b[2Jx\r\n"))
		}, "500 Internal Server Error:  [2Jx"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(c.answer)
			defer server.Close()
			a := newAPI(func(ctx context.Context) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", server.Listener.Addr().String())
			})
			if _, err := a.info(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// FuzzFault: what Firecracker says is one short line for a terminal, whoever speaks for it.
func FuzzFault(f *testing.F) {
	f.Add([]byte(`{"fault_message": "no"}`))
	f.Add([]byte("\x1b[2J\xff\r\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		text := fault(body)
		if len(text) > 500 || !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("%q of %q", text, body)
		}
	})
}
