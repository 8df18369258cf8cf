package testenv

import (
	"context"
	"os"
	"path/filepath"

	"cal/internal/testenv/vm"
	"cal/nucleus"
)

// MicroVM returns the flags of `cal run` for a machine under QEMU, which needs no KVM: Debian's
// kernel and its usual image, both made once for all tests and copied here. The test is
// skipped where QEMU or Debian's archive is missing.
func (e *Env) MicroVM() []string {
	e.t.Helper()
	vm.Kernel(e.t) // or skip
	store, dir := vm.SharedStore(e.t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := store.Root(ctx, nucleus.Image{Kind: nucleus.ImageDebian}, "/", nil); err != nil {
		e.t.Skipf("no image to start a machine from: %v", err)
	}
	if err := os.CopyFS(filepath.Join(e.CAL, "images"), os.DirFS(dir)); err != nil {
		e.t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(e.CAL, "images"), 0o700); err != nil {
		e.t.Fatal(err)
	}
	e.patience = 4 * patience // an emulated machine takes its time
	return []string{"--driver", "qemu"}
}
