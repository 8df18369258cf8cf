package main

import (
	"crypto/ed25519"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"cal/approval/client"
	"cal/audit"
	"cal/nucleus"
)

// Who may ask gets the authority's log whole, under the key that it names.
func TestLogIsHandedOut(t *testing.T) {
	home := t.TempDir()
	quickKey(t, home)
	api, _ := daemon(t, home, func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--ask-uid", "54321") })
	if err := api.RegisterPod(t.Context(), "p-1", map[string][]byte{"agent": requester.Public().(ed25519.PublicKey)}); err != nil {
		t.Fatal(err)
	}
	const asks = 300 // more than one tile
	for i := range asks {
		ask := newAsk(t, nucleus.NewID("a-"), "true", string(rune('a'+i%26)))
		status, err := api.Submit(t.Context(), ask)
		if err == nil {
			_, err = api.Deny(t.Context(), ask.ID, client.Denial{AskDigest: status.AskDigest})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	info, err := api.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	copied := t.TempDir()
	if err := api.Log(t.Context(), copied); err != nil {
		t.Fatal(err)
	}
	report, err := audit.Verify(copied, audit.VerifyOptions{Key: info.Log})
	if err != nil || !report.OK() || report.Size < 2*asks {
		t.Fatalf("%+v, %v", report, err)
	}
	if _, err := os.Stat(filepath.Join(copied, "journal")); err != nil {
		t.Error(err)
	}
	if err := api.Log(t.Context(), copied); err == nil {
		t.Error("it was written over what was there")
	}
}
