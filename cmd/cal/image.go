package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cal/image"
	"cal/node/client"
	"cal/nucleus"
	"cal/workspace"
)

const imageUsage = "root file system: host, debian[@SUITE][:PACKAGE,...], oci:REF, tarball:PATH or directory:PATH (default: the driver's usual one)"

func imageCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "What machines are made of: kernels and root file systems", Example: "  cal image list"}
	cmd.AddCommand(imageList(), imageBuild(), imageInspect(), imagePrune())
	return cmd
}

func withImages(use func(*image.Store) error) error {
	home, err := workspace.OpenHome()
	if err != nil {
		return err
	}
	store, err := home.Images()
	if err != nil {
		return err
	}
	return use(store)
}

func imageList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list", Short: "List what is in the store, the one used last first", Example: "  cal image list --json", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withImages(func(store *image.Store) error {
				list, err := store.List(cmd.Context(), false)
				if err != nil {
					return err
				}
				return printList(list, asJSON, imageHeader, imageRow)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

const imageHeader = "KIND\tDIGEST\tSIZE\tUSED\tBY\tWHAT"

func imageRow(l image.Listed) string {
	what := workspace.Shown(l.What)
	if l.Wrong != "" {
		what = "corrupt (cal image inspect says how)"
	}
	return fmt.Sprintf("%s\t%s\t%s\t%s ago\t%s\t%s", orDash(l.Kind), short(l.Digest), mebibytes(l.Size), time.Since(l.Used).Round(time.Second), count(len(l.UsedBy), "machine"), what)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// short is as much of a digest as tells it from others.
func short(digest string) string {
	return fmt.Sprintf("%.12s", strings.TrimPrefix(digest, "sha256:"))
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// built is what `cal image build` says of each image.
type built struct {
	Image   string `json:"image"`
	Kind    string `json:"kind"`
	Digest  string `json:"digest"`
	Size    int64  `json:"size"` // bytes
	Path    string `json:"path"`
	Tree    string `json:"tree,omitempty"`    // digest of what was unpacked
	Version string `json:"version,omitempty"` // of a kernel
	Tried   *bool  `json:"tried,omitempty"`   // CAL was tried with this kernel
}

func imageBuild() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "build IMAGE...", Short: "Make images anew: ask a registry or an archive again, and build the disks of microVMs",
		Long: `IMAGE is a root file system as for cal run --image, or kernel: Debian's cloud kernel, or
kernel:PATH, a bzImage or an ELF. The kernel that was built last is that of all microVMs
that start later.`,
		Example: `  cal image build kernel debian:python3,nodejs
  cal image build oci:docker.io/library/debian:12 --json
  cal image build kernel:/boot/vmlinuz-6.1.0-56-cloud-amd64`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return withImages(func(store *image.Store) error {
				list := []built{}
				for _, text := range given {
					b, err := buildImage(cmd.Context(), store, text)
					if err != nil {
						return err
					}
					list = append(list, b)
				}
				return printList(list, asJSON, "IMAGE\tDIGEST\tSIZE\tPATH", func(b built) string {
					return fmt.Sprintf("%s\t%s\t%s\t%s", workspace.Shown(b.Image), short(b.Digest), mebibytes(b.Size), b.Path)
				})
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// progress tells on standard error what takes a while.
func progress(line string) { fmt.Fprintln(os.Stderr, "cal: "+workspace.Shown(line)) }

func buildImage(ctx context.Context, store *image.Store, text string) (built, error) {
	kind, path, named := strings.Cut(text, ":")
	if kind == "kernel" {
		if named && path == "" {
			return built{}, usageError{errors.New("kernel: names no file")}
		}
		return buildKernel(ctx, store, path)
	}
	wanted, err := workspace.ParseImage(text)
	if err != nil {
		return built{}, err
	}
	if wanted.Kind == "" {
		return built{}, usageError{errors.New("an image is to be named: " + imageUsage)}
	}
	tree, disk, err := store.RenewRoot(ctx, wanted, "/", progress)
	return built{Image: wanted.String(), Kind: "root", Digest: disk.Digest, Size: disk.Size, Path: disk.Path, Tree: tree}, err
}

func buildKernel(ctx context.Context, store *image.Store, path string) (built, error) {
	if path != "" {
		var err error
		if path, err = filepath.Abs(path); err != nil {
			return built{}, err
		}
	}
	k, err := store.RenewKernel(ctx, path, progress)
	if err != nil {
		return built{}, err
	}
	info, err := os.Stat(k.Image)
	if err != nil {
		return built{}, err
	}
	if !k.Tried {
		progress(fmt.Sprintf("CAL was not tried with kernel %s, which is now that of all microVMs; hint: where they do not start, cal image build kernel goes back to Debian's", orDash(k.Version)))
	}
	name := k.Package
	if name == "" {
		name = "kernel:" + path
	}
	return built{Image: name, Kind: "kernel", Digest: k.Digest, Size: info.Size(), Path: k.Image, Version: k.Version, Tried: &k.Tried}, nil
}

func imageInspect() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "inspect DIGEST", Short: "Show an object of the store whole, after reading all of it",
		Long:    "DIGEST may be shortened. An object that is not as it was recorded is an error.",
		Example: "  cal image inspect 51349501a3d1 --json", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return withImages(func(store *image.Store) error { return inspectImage(cmd.Context(), store, given[0], asJSON) })
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func inspectImage(ctx context.Context, store *image.Store, digest string, asJSON bool) error {
	l, err := store.Inspect(ctx, digest)
	if err != nil {
		return err
	}
	if asJSON {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(l)
	} else {
		showImage(l)
	}
	if l.Wrong != "" {
		return errors.New(l.Wrong)
	}
	return err
}

func showImage(l image.Listed) {
	line := func(name, format string, args ...any) {
		fmt.Printf("%-10s %s\n", name, workspace.Shown(fmt.Sprintf(format, args...)))
	}
	line("kind", "%s", orDash(l.Kind))
	line("digest", "%s", l.Digest)
	line("made from", "%s", l.What)
	line("made", "%s", l.Made.Format(time.RFC3339))
	line("used", "%s", l.Used.Format(time.RFC3339))
	line("on disk", "%s", mebibytes(l.Size))
	for _, dir := range l.UsedBy {
		line("used by", "%s", dir)
	}
	for _, name := range slices.Sorted(maps.Keys(l.Facts)) {
		line(name, "%s", l.Facts[name])
	}
	for _, name := range slices.Sorted(maps.Keys(l.Env)) {
		line("env", "%s=%s", name, l.Env[name])
	}
	for _, f := range l.Files {
		line("file", "%s %s %d", f.Digest, f.Name, f.Size)
	}
}

const prunedHeader = "OUTCOME\tKIND\tDIGEST\tSIZE\tWHY\tWHAT"

func prunedRow(p image.Pruned) string {
	outcome := "kept"
	if p.Removed {
		outcome = "removed"
	}
	return fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", outcome, orDash(p.Kind), short(p.Digest), mebibytes(p.Size), workspace.Shown(p.Why), workspace.Shown(orDash(p.What)))
}

func imagePrune() *cobra.Command {
	var asJSON, all, verify bool
	unused := 7 * 24 * time.Hour
	cmd := &cobra.Command{
		Use: "prune", Short: "Remove what no machine uses and was not wanted for a while, and what is corrupt",
		Long: `What was wanted in the last ten minutes stays in any case, unless it is corrupt. A corrupt
object goes even while a machine uses it; the machine goes on with what it has open. All that
there is is listed, with why it was removed or kept.`,
		Example: "  cal image prune --unused 24h\n  cal image prune --all\n  cal image prune --verify --json", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if unused < 0 {
				return usageError{fmt.Errorf("--unused is %s, want 0 or more", unused)}
			}
			if all && cmd.Flags().Changed("unused") {
				return usageError{errors.New("--all and --unused say two different things")}
			}
			if all {
				unused = 0
			}
			return withImages(func(store *image.Store) error {
				done, err := store.Prune(cmd.Context(), unused, verify, time.Now())
				if printErr := printList(done, asJSON, prunedHeader, prunedRow); err == nil {
					err = printErr
				}
				removed, size := 0, int64(0)
				for _, p := range done {
					if p.Removed {
						removed, size = removed+1, size+p.Size
					}
				}
				fmt.Fprintf(os.Stderr, "cal: %s removed, %s; %d kept\n", count(removed, "object"), mebibytes(size), len(done)-removed)
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&unused, "unused", unused, "for how long it was not wanted")
	cmd.Flags().BoolVar(&all, "all", false, "whatever no machine uses")
	cmd.Flags().BoolVar(&verify, "verify", false, "read all of each object to find what is corrupt")
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// prepareImage makes what a machine will be made of where that takes a while, so that a
// person sees what is done; the node would do the same and say nothing.
func prepareImage(ctx context.Context, home workspace.Home, node *client.Client, spec nucleus.PodSpec) error {
	store, err := home.Images()
	if err != nil {
		return err
	}
	pod, err := planPod(ctx, node, spec) // which knows the driver and its usual image
	if err != nil {
		return err
	}
	wanted, err := nucleus.ParseImage(pod.Image)
	if err != nil {
		return err
	}
	lies := wanted.Kind == nucleus.ImageHost || wanted.Kind == nucleus.ImageDirectory
	if pod.Tier != nucleus.TierVM && pod.Tier != nucleus.TierEmulated {
		if lies {
			return nil // and is shown where it lies
		}
		_, err = store.Resolve(ctx, wanted, "/", progress)
		return err
	}
	if _, err := store.Kernel(ctx, "", progress); err != nil {
		return err
	}
	if _, err := store.Root(ctx, wanted, "/", progress); err != nil {
		return err
	}
	layers := spec.Agent.Places()
	if wanted.Kind == nucleus.ImageHost {
		layers = slices.Concat(spec.Image.Layers, layers)
	}
	if len(layers) > 0 {
		_, err = store.Layers(ctx, layers, progress)
	}
	return err
}
