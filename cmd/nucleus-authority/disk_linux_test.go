package main

import (
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cal/approval/client"
	"cal/authority"
	"cal/nucleus"
)

// diskHome is a CAL_HOME whose authority is on a small disk of its own.
func diskHome(t *testing.T) (home, disk string) {
	t.Helper()
	home = t.TempDir()
	disk = filepath.Join(home, "authority")
	if err := os.MkdirAll(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=100m,mode=700"); err != nil {
		t.Skipf("no disk of an own can be made: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	quickKey(t, home)
	return home, disk
}

// fill leaves so many bytes free.
func fill(t *testing.T, disk string, free uint64) (empty func()) {
	t.Helper()
	name := filepath.Join(disk, "filler")
	var stat unix.Statfs_t
	if err := unix.Statfs(disk, &stat); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, int64(stat.Bavail*uint64(stat.Bsize)-free)), f.Close()); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}

// The authority's disk becomes full, and has room again: the same daemon goes on, what was granted
// before is used once, and what was tried meanwhile costs no use.
func TestDiskFull(t *testing.T) {
	home, disk := diskHome(t)
	api, _ := daemon(t, home, nil)
	ctx := t.Context()
	if err := api.RegisterPod(ctx, "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	key, err := authority.ReadKey(disk, "")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := key.Open(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	defer signer.Close()
	grant := func(ask nucleus.AskRequest) (client.Status, error) {
		token, err := signer.Grant(ask, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		return api.Grant(ctx, ask.ID, token)
	}
	pending, granted, revoked := newAsk(t, "a-pending", "true"), newAsk(t, "a-granted", "true", "x"), newAsk(t, "a-revoked", "true", "y")
	var grants []string
	for _, ask := range []nucleus.AskRequest{pending, revoked, granted} {
		if _, err := api.Submit(ctx, ask); err != nil {
			t.Fatal(err)
		}
		if ask.ID == pending.ID {
			continue
		}
		status, err := grant(ask)
		if err != nil {
			t.Fatal(err)
		}
		grants = []string{status.Grants[0].Grant}
	}
	use := func(permit string) error {
		_, err := api.Use(ctx, granted.ID, client.Use{Permit: permit, Grants: grants})
		return err
	}

	empty := fill(t, disk, 0)
	for what, err := range map[string]error{"use": use("r-1"), "use again": use("r-2"), "grant": func() error { _, err := grant(pending); return err }()} {
		if err == nil || !strings.Contains(err.Error(), "full") && !strings.Contains(err.Error(), "no space") {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	if _, err := api.Submit(ctx, newAsk(t, "a-full", "true")); err == nil || !strings.Contains(err.Error(), "make room") {
		t.Errorf("an ask on a full disk: %v", err)
	}
	now, err := api.Revoke(ctx, client.Revocation{ID: revoked.ID})
	t.Logf("revoke on a full disk: %+v, %v", now, err)
	if err == nil && !now.Unrecorded {
		t.Error("it is said to be recorded")
	}
	if list, err := api.Approvals(ctx, client.ApprovalsOf{}); err != nil || len(list) > 1 {
		t.Errorf("what can be used: %+v, %v", list, err)
	}

	empty()
	if err := use("r-3"); err != nil {
		t.Errorf("use with room again: %v", err)
	}
	if err := use("r-4"); err == nil {
		t.Error("it was used twice")
	}
	if s, err := grant(pending); err != nil || s.State != client.Granted {
		t.Errorf("grant with room again: %+v, %v", s, err)
	}
	if _, err := api.Submit(ctx, newAsk(t, "a-after", "true", "after")); err != nil {
		t.Errorf("ask with room again: %v", err)
	}
	wantState(t, api, revoked.ID, client.Revoked)
	list, err := api.Approvals(ctx, client.ApprovalsOf{All: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if a.Ask == granted.ID && (len(a.Uses) != 1 || a.Uses[0].Permit != "r-3") {
			t.Errorf("uses: %+v", a.Uses)
		}
	}
}

// Who may ask does not take the disk of who decides: the last of it is left for what is decided.
func TestAskingLeavesRoom(t *testing.T) {
	home, disk := diskHome(t)
	api, _ := daemon(t, home, nil)
	keys := map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}
	if err := api.RegisterPod(t.Context(), "p-1", keys); err != nil {
		t.Fatal(err)
	}
	ask := newAsk(t, "a-1", "true")
	if _, err := api.Submit(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	fill(t, disk, 32<<20)
	_, asked := api.Submit(t.Context(), newAsk(t, "a-2", "true"))
	for what, err := range map[string]error{"a pod": api.RegisterPod(t.Context(), "p-2", keys), "an ask": asked} {
		if err == nil || !strings.Contains(err.Error(), "make room") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if s, err := api.Deny(t.Context(), ask.ID, client.Denial{AskDigest: wantState(t, api, ask.ID, client.Pending).AskDigest}); err != nil || s.State != client.Denied {
		t.Errorf("a decision: %+v, %v", s, err)
	}
}
