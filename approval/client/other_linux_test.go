package client

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// The users of a story: who asks, and whose the authority is.
const (
	ada      = 54321
	approver = 54322
)

// listenAs listens as the kernel sees another user do it, whom it names to who connects.
func listenAs(t *testing.T, uid int, socket string) net.Listener {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(uid int) {
		// Of this thread alone; package syscall would change all of them.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			t.Fatal(errno)
		}
	}
	become(uid)
	defer become(0)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// told is an authority that says of itself that it is another user's.
type told struct {
	name  string
	asked atomic.Int32
	then  func() // when it was asked who approves
}

func (a *told) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.asked.Add(1)
	if a.then != nil {
		a.then()
	}
	answer := any(Info{Approvers: []nucleus.Approver{{Name: a.name}}, Approvals: OtherUser})
	if r.URL.Path != "/v1/info" {
		answer = Status{ID: "a-1", State: Pending}
	}
	_ = json.NewEncoder(w).Encode(answer)
}

// TestOtherUserSwapped turns the path of the socket while it is asked whose it is: what counts is
// who is at the end of the connection that is spoken on.
func TestOtherUserSwapped(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may become another user")
	}
	dir, err := os.MkdirTemp("", "cal-other-") // in which others may make theirs
	if err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "authority.sock")
	point := func(at string) {
		next := link + ".next"
		if err := os.Symlink(filepath.Join(dir, at), next); err != nil {
			t.Error(err)
		}
		if err := os.Rename(next, link); err != nil {
			t.Error(err)
		}
	}
	serve := func(name string, uid int) *told {
		a := &told{name: name}
		server := http.Server{Handler: a}
		l, done := listenAs(t, uid, filepath.Join(dir, name)), make(chan error, 1)
		go func() { done <- server.Serve(l) }()
		t.Cleanup(func() {
			_ = server.Close()
			<-done
		})
		return a
	}
	serve("theirs", approver)
	hers := serve("hers", ada)
	open := func() *Client {
		c := New(link)
		c.own = func() int { return ada }
		t.Cleanup(c.Close)
		return c
	}
	refused := func(what string, err error, text string) {
		t.Helper()
		if err == nil || nucleus.AsError(err).Kind != nucleus.KindUnavailable || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want %q", what, err, text)
		}
	}

	point("theirs")
	info, err := open().Approvers(t.Context(), RequireOtherUser)
	if err != nil || len(info.Approvers) != 1 || info.Approvers[0].Name != "theirs" || info.Approvals != OtherUser {
		t.Fatalf("positive control: %+v, %v", info, err)
	}
	named := func(uid int) string { return RequireOtherUser + ":" + strconv.Itoa(uid) }
	if info, err := open().Approvers(t.Context(), RequireOtherUser, named(approver)); err != nil || info.Approvals != OtherUser {
		t.Errorf("the user who is named: %+v, %v", info, err)
	}
	_, err = open().Approvers(t.Context(), named(approver+1), RequireOtherUser)
	refused("another user than the one who is named", err, "approvals of uid 54323 are required")
	if _, err := open().Approvers(t.Context(), named(approver), named(approver+1)); err == nil {
		t.Error("two users are required")
	}
	root := open()
	root.own = func() int { return 0 }
	_, err = root.Approvers(t.Context(), RequireOtherUser)
	refused("for root", err, "root's")

	// Her own answers who approves, and is theirs by the time somebody looks.
	point("hers")
	hers.then = func() { point("theirs") }
	if info, err := open().Info(t.Context()); err != nil || info.Approvals != SameUser {
		t.Errorf("nothing is required of her own: %+v, %v; want %q", info, err, SameUser)
	}
	if hers.asked.Swap(0) == 0 {
		t.Fatal("her own was not asked")
	}
	point("hers")
	info, err = open().Approvers(t.Context(), RequireOtherUser)
	refused("her own, turned", err, "uid 54321's like this node")
	if n := hers.asked.Swap(0); n != 0 || len(info.Approvers) != 0 {
		t.Errorf("her own was told %d requests, and these can approve: %+v", n, info)
	}

	// And the other way round: what was theirs is hers at the next connection.
	point("theirs")
	c := open().OfOtherUser(AnyUser)
	t.Cleanup(c.Close)
	if s, err := c.Status(t.Context(), "a-1"); err != nil || s.State != Pending {
		t.Fatalf("positive control: %+v, %v", s, err)
	}
	point("hers")
	if _, err := c.Status(t.Context(), "a-1"); err != nil { // on the connection that it has
		t.Error(err)
	}
	c.Close()
	_, err = c.Status(t.Context(), "a-1")
	refused("a later connection", err, "uid 54321's like this node")
	if n := hers.asked.Load(); n != 0 {
		t.Errorf("her own was told %d requests", n)
	}
}
