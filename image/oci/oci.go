// Package oci fetches images from registries.
//
// A registry, and who pushed to it, is a stranger; with a digest nobody can exchange an
// image on the way, and with a tag nobody but them. The package promises: what is
// unpacked has the digests that the manifest names, and the manifest that of the
// reference; no place is asked that the manifest names; where the registry itself sends who
// asks elsewhere, as to a store of large files, that is over TLS, without credentials, and to
// no address of the host's own network, unless the registry is there too; sizes are bounded
// before they are believed. The credentials are those with which the person has logged in to
// the registry, and go to it alone, or to a token service of its domain.
package oci

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"cal/image/unpack"
	"cal/nucleus"
)

// Image is one for linux/amd64 in a registry.
type Image struct {
	Digest string   // "sha256:..." of its manifest
	Env    []string // NAME=VALUE, as the image has it

	image    v1.Image
	manifest *v1.Manifest
}

// Bounds of what a registry says.
const (
	mostLayers    = 500
	largestConfig = 4 << 20
	userAgent     = "cal/" + nucleus.Version
)

// Open asks for an image: [REGISTRY/]NAME[:TAG][@sha256:...].
func Open(ctx context.Context, ref string) (*Image, error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	transport := newGuard(parsed.Context().RegistryStr(), parsed.Context().Scheme() == "https")
	image, err := remote.Image(parsed, remote.WithContext(ctx), remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}),
		remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithTransport(transport), remote.WithUserAgent(userAgent))
	if err != nil {
		return nil, err
	}
	i := &Image{image: image}
	if err := i.read(); err != nil {
		return nil, fmt.Errorf("%s: %w", parsed.Name(), err)
	}
	return i, nil
}

func (i *Image) read() error {
	digest, err := i.image.Digest()
	if err != nil {
		return err
	}
	i.Digest = digest.String()
	if i.manifest, err = i.image.Manifest(); err != nil {
		return err
	}
	if n := len(i.manifest.Layers); n > mostLayers {
		return fmt.Errorf("%d layers, want at most %d", n, mostLayers)
	}
	for _, layer := range i.manifest.Layers {
		if len(layer.URLs) > 0 {
			return fmt.Errorf("layer %s lies at another place (%s), which is not asked", layer.Digest, layer.URLs[0])
		}
	}
	if size := i.manifest.Config.Size; size > largestConfig {
		return fmt.Errorf("a configuration of %d bytes", size)
	}
	config, err := i.image.ConfigFile()
	if err != nil {
		return err
	}
	if config.OS != "linux" || config.Architecture != "amd64" {
		return fmt.Errorf("an image for %s/%s, want linux/amd64", config.OS, config.Architecture)
	}
	i.Env = config.Config.Env
	return nil
}

// Size is how many bytes are fetched.
func (i *Image) Size() int64 {
	var size int64
	for _, layer := range i.manifest.Layers {
		size += layer.Size
	}
	return size
}

// Unpack fetches the layers and writes them one over another. said is told of each.
func (i *Image) Unpack(ctx context.Context, into *unpack.Into, said func(layer, of int, size int64)) error {
	for n, layer := range i.manifest.Layers {
		said(n+1, len(i.manifest.Layers), layer.Size)
		if err := i.layer(ctx, layer.Digest, into); err != nil {
			return fmt.Errorf("layer %s: %w", layer.Digest, err)
		}
	}
	return nil
}

func (i *Image) layer(ctx context.Context, digest v1.Hash, into *unpack.Into) (err error) {
	layer, err := i.image.LayerByDigest(digest)
	if err != nil {
		return err
	}
	packed, err := layer.Compressed()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, packed.Close()) }()
	plain, err := unpack.PlainStream(ctx, packed)
	if err != nil {
		return err
	}
	defer plain.Close()
	if err := into.Add(ctx, plain, unpack.Layer); err != nil {
		return err
	}
	// The digest is known to be right at the end of what is packed, not of the archive.
	_, err = io.Copy(io.Discard, packed)
	return err
}
