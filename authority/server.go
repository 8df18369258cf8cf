package authority

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"cal/approval"
	"cal/approval/client"
	"cal/internal/peercred"
	"cal/nucleus"
)

const maxBody = 64 << 10 // of anything but an ask

// Serve answers on a unix socket at path until ctx ends, and returns when the
// last request has. The socket is the user's own, in a directory of its own,
// unless AskUIDs names others: then they can connect, and only who is named is
// heard. A socket that a dead daemon left behind is replaced.
func (a *Authority) Serve(ctx context.Context, path string, ready func()) error {
	listener, err := a.listen(path)
	if err != nil {
		return err
	}
	stopping, stop := context.WithCancel(context.Background())
	defer stop()
	server := &http.Server{
		Handler:           a.handler(),
		ConnContext:       withPeer,
		BaseContext:       func(net.Listener) context.Context { return stopping },
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      client.MaxWait + 30*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	a.servePasskeys()
	defer a.closePage()
	var small sync.WaitGroup
	small.Go(func() { a.keepSmall(stopping) })
	small.Go(func() { a.keepSettled(stopping) })
	defer small.Wait()
	defer stop()
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	if ready != nil {
		ready()
	}
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop() // those who wait for a decision are answered "pending"
	last, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err = server.Shutdown(last)
	if served := <-served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

func (a *Authority) listen(path string) (net.Listener, error) {
	dirMode, mode := os.FileMode(0o700), os.FileMode(0o600)
	if len(a.cfg.AskUIDs) > 0 {
		dirMode, mode = 0o711, 0o666
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return nil, err
	}
	if err := CheckSocketDir(path); err != nil {
		return nil, err
	}
	if info, err := os.Stat(dir); err != nil {
		return nil, err
	} else if loose := info.Mode().Perm() &^ dirMode; loose != 0 {
		return nil, fmt.Errorf("%s has mode %v, want at most %v", dir, info.Mode().Perm(), dirMode)
	}
	// The lock on the key's directory says that no other daemon of this key runs;
	// a living socket of anybody else is left alone.
	if err := removeDead(path); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

func removeDead(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s is %v, not a socket", path, info.Mode().Type())
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return errors.Join(fmt.Errorf("something answers at %s already", path), conn.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// CheckSocketDir refuses a socket in a directory that somebody else can write:
// what answers there could be anybody.
func CheckSocketDir(path string) error {
	dir := filepath.Dir(path)
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	if owner != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s has mode %v and uid %d, want a directory that only uid %d can write", dir, info.Mode().Perm(), owner, os.Geteuid())
	}
	return nil
}

type peerKey struct{}

// withPeer notes who connected, as the kernel says.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	if uid, err := peercred.UID(conn); err == nil {
		return context.WithValue(ctx, peerKey{}, uid)
	}
	return ctx // handled as nobody
}

// role is what a route needs of a peer.
type role int

const (
	asker   role = iota // the daemon's own user, or one of AskUIDs
	decider             // the daemon's own user
)

func (a *Authority) allowed(r *http.Request, want role) (int, error) {
	uid, known := r.Context().Value(peerKey{}).(int)
	switch {
	case !known:
		return 0, nucleus.Errorf(nucleus.KindUnauthenticated, "the peer of this connection is not known")
	case uid == os.Geteuid(), want == asker && slices.Contains(a.cfg.AskUIDs, uid):
		return uid, nil
	}
	return 0, nucleus.Errorf(nucleus.KindForbidden, "uid %d may not do this here", uid)
}

func (a *Authority) handler() http.Handler {
	mux := http.NewServeMux()
	route := func(pattern string, want role, serve func(*http.Request, int) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			uid, err := a.allowed(r, want)
			var reply any
			if err == nil {
				reply, err = serve(r, uid)
			}
			answer(w, reply, err)
		})
	}
	route("GET /v1/info", asker, func(_ *http.Request, uid int) (any, error) { return a.info(uid), nil })
	route("POST /v1/pods", asker, func(r *http.Request, _ int) (any, error) {
		var pod client.Pod
		if err := read(r, maxBody, &pod); err != nil {
			return nil, err
		}
		return struct{}{}, a.RegisterPod(pod)
	})
	route("POST /v1/asks", asker, func(r *http.Request, _ int) (any, error) {
		raw, err := body(r, 2*approval.MaxAsk)
		if err != nil {
			return nil, err
		}
		return a.Submit(raw)
	})
	route("GET /v1/asks", asker, func(r *http.Request, _ int) (any, error) {
		most, err := strconv.Atoi(cmp.Or(r.URL.Query().Get("limit"), strconv.Itoa(client.MaxListed)))
		if err != nil || most < 1 || most > client.MaxListed {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "limit=%q, want 1 to %d", r.URL.Query().Get("limit"), client.MaxListed)
		}
		return a.store.list(r.URL.Query().Get("state"), most, a.millis())
	})
	route("GET /v1/asks/{id}", asker, func(r *http.Request, _ int) (any, error) { return a.wait(r) })
	route("GET /v1/asks/{id}/bytes", asker, func(r *http.Request, _ int) (any, error) {
		row, err := a.store.ask(r.PathValue("id"))
		if errors.Is(err, errUnknown) {
			return nil, nucleus.Errorf(nucleus.KindNotFound, "there is no ask %q", r.PathValue("id"))
		}
		if err == nil && row.shed() {
			return nil, gone(row, row.stateAt(a.millis()))
		}
		if err != nil {
			return nil, unavailable(err)
		}
		raw, err := a.store.canonical(row.id)
		return exact(raw), unavailable(err)
	})
	route("POST /v1/asks/{id}/grant", decider, func(r *http.Request, _ int) (any, error) {
		var g client.SignedGrant
		if err := read(r, maxBody, &g); err != nil {
			return nil, err
		}
		return a.Grant(r.PathValue("id"), g.Token)
	})
	route("POST /v1/asks/{id}/denial", decider, func(r *http.Request, _ int) (any, error) {
		var d client.Denial
		if err := read(r, maxBody, &d); err != nil {
			return nil, err
		}
		return a.Deny(r.PathValue("id"), d)
	})
	route("POST /v1/asks/{id}/uses", asker, func(r *http.Request, _ int) (any, error) {
		var use client.Use
		if err := read(r, maxBody, &use); err != nil {
			return nil, err
		}
		return a.Use(r.PathValue("id"), use)
	})
	route("POST /v1/asks/{id}/outcomes", asker, func(r *http.Request, _ int) (any, error) {
		var o client.Outcome
		if err := read(r, maxBody, &o); err != nil {
			return nil, err
		}
		return struct{}{}, a.Report(r.PathValue("id"), o)
	})
	route("GET /v1/approvals", asker, func(r *http.Request, _ int) (any, error) {
		query := r.URL.Query()
		limit, err := strconv.Atoi(query.Get("limit"))
		if err != nil {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "limit=%q is no number", query.Get("limit"))
		}
		return a.Approvals(client.ApprovalsOf{Pod: query.Get("pod"), All: query.Get("all") == "true", Limit: limit})
	})
	route("POST /v1/revocations", decider, func(r *http.Request, _ int) (any, error) {
		var revocation client.Revocation
		if err := read(r, maxBody, &revocation); err != nil {
			return nil, err
		}
		return a.Revoke(r.Context(), revocation)
	})
	route("GET /v1/revocations", asker, func(r *http.Request, _ int) (any, error) {
		after, err := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64)
		if err != nil {
			return nil, nucleus.Errorf(nucleus.KindInvalid, "after=%q is no number", r.URL.Query().Get("after"))
		}
		return a.Watch(r.Context(), r.URL.Query().Get("watcher"), client.Watched{Database: r.URL.Query().Get("database"), Seq: after})
	})
	route("POST /v1/pods/{pod}/withdrawal", asker, func(r *http.Request, _ int) (any, error) {
		var w client.Withdrawal
		if err := read(r, maxBody, &w); err != nil {
			return nil, err
		}
		return a.Withdraw(r.PathValue("pod"), w)
	})
	route("POST /v1/approvers", decider, func(r *http.Request, _ int) (any, error) {
		var n client.NewApprover
		if err := read(r, maxBody, &n); err != nil {
			return nil, err
		}
		return a.AddApprover(n)
	})
	route("DELETE /v1/approvers/{name}", decider, func(r *http.Request, _ int) (any, error) {
		return a.RemoveApprover(r.PathValue("name"))
	})
	mux.HandleFunc("GET /v1/log", a.serveLog)
	a.passkeyRoutes(route)
	a.witnessRoutes(mux, route)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, nucleus.Errorf(nucleus.KindNotFound, "there is no %s %s", r.Method, r.URL.Path))
	})
	return mux
}

func (a *Authority) info(uid int) client.Info {
	info := client.Info{Approvers: a.Approvers(), Approvals: client.OtherUser, Witness: a.witness.PublicKey(), Log: a.cfg.LogKey}
	if uid == os.Geteuid() || uid == 0 { // root can be any user
		info.Approvals = client.SameUser
	}
	return info
}

// wait answers when the ask is decided or expires, at the latest after the
// seconds asked for.
func (a *Authority) wait(r *http.Request) (client.Status, error) {
	limit, err := waitOf(r)
	if err != nil {
		return client.Status{}, err
	}
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	for {
		status, left, changed, err := a.look(r.PathValue("id"))
		if err != nil || status.State != client.Pending || limit == 0 {
			return status, err
		}
		expiry := time.NewTimer(time.Duration(left) * time.Millisecond)
		select {
		case <-changed:
		case <-expiry.C:
		case <-deadline.C:
			limit = 0 // one last look
		case <-r.Context().Done():
			limit = 0
		}
		expiry.Stop()
	}
}

// waitOf is how long a request wants to be held open.
func waitOf(r *http.Request) (time.Duration, error) {
	text := r.URL.Query().Get("wait")
	if text == "" {
		return 0, nil
	}
	seconds, err := strconv.Atoi(text)
	if most := int(client.MaxWait / time.Second); err != nil || seconds < 0 || seconds > most {
		return 0, nucleus.Errorf(nucleus.KindInvalid, "wait=%q, want 0 to %d seconds", text, most)
	}
	return time.Duration(seconds) * time.Second, nil
}

// exact is JSON that is sent byte by byte as it is.
type exact []byte

func read(r *http.Request, limit int64, v any) error {
	raw, err := body(r, limit)
	if err != nil {
		return err
	}
	if err := nucleus.Strict(raw, v); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	return nil
}

func body(r *http.Request, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, limit))
	var long *http.MaxBytesError
	if errors.As(err, &long) {
		return nil, nucleus.Errorf(nucleus.KindTooLarge, "the body is longer than %d bytes", limit)
	} else if err != nil {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	return raw, nil
}

func answer(w http.ResponseWriter, reply any, err error) {
	code := http.StatusOK
	if err != nil {
		refusal := nucleus.AsError(err)
		code = statusOf(refusal.Kind)
		reply = map[string]*nucleus.Error{"error": refusal}
	}
	raw, ok := reply.(exact)
	if !ok {
		marshalled, err := json.Marshal(reply)
		if err != nil {
			code, marshalled = http.StatusInternalServerError, []byte(`{"error":{"kind":"internal","message":"the answer cannot be written"}}`)
		}
		raw = marshalled
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(raw) // a peer that went away asks again
}

func statusOf(kind nucleus.Kind) int {
	switch kind {
	case nucleus.KindInvalid:
		return http.StatusBadRequest
	case nucleus.KindUnauthenticated:
		return http.StatusUnauthorized
	case nucleus.KindForbidden, nucleus.KindRefused:
		return http.StatusForbidden
	case nucleus.KindNotFound:
		return http.StatusNotFound
	case nucleus.KindConflict:
		return http.StatusConflict
	case nucleus.KindTooLarge:
		return http.StatusRequestEntityTooLarge
	case nucleus.KindUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
