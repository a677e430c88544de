package main

import (
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/api"
)

func (c *cli) imageCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Pull, import, list and remove images"}
	cmd.AddCommand(c.imagePullCommand(), c.imageImportCommand(), c.imageListCommand(), c.imageRemoveCommand(), c.imageCollectCommand())
	return cmd
}

// fetch pulls or imports an image and shows what came of it.
func (c *cli) fetch(cmd *cobra.Command, ref string) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	img, err := client.Pull(cmd.Context(), ref, c.progress())
	if err != nil {
		return err
	}
	if c.json() {
		return c.print(img)
	}
	c.say("%s is here: %s, %d layers, %s", ref, img.Digest.Short(), img.Layers, size(img.Size))
	return nil
}

func (c *cli) imagePullCommand() *cobra.Command {
	return &cobra.Command{
		Use: "pull REF", Short: "Fetch an image from a registry", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error { return c.fetch(cmd, absolute(a[0])) },
	}
}

func (c *cli) imageImportCommand() *cobra.Command {
	return &cobra.Command{
		Use: "import PATH", Short: "Import an OCI layout, a docker or OCI archive, a tarball or a directory",
		Long: "Import an OCI layout (oci:DIR), a docker or OCI archive or a tarball of a root filesystem (tar:FILE), or a directory with a root filesystem (dir:DIR). Without a prefix, what PATH is decides.",
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error { return c.fetch(cmd, absolute(guess(a[0]))) },
	}
}

// guess names the kind of a local image.
func guess(path string) string {
	st, err := os.Stat(path)
	if err != nil {
		return path // it has a prefix, or the daemon says what is wrong
	}
	if !st.IsDir() {
		return "tar:" + path
	}
	if _, err := os.Stat(strings.TrimSuffix(path, "/") + "/oci-layout"); err == nil {
		return "oci:" + path
	}
	return "dir:" + path
}

func (c *cli) imageListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List the images", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			list, err := client.Images(cmd.Context())
			if err != nil {
				return err
			}
			if c.json() {
				return c.print(list)
			}
			rows := make([][]string, len(list))
			for i, img := range list {
				refs := strings.Join(img.Refs, ",")
				if refs == "" {
					refs = "-"
				}
				rows[i] = []string{refs, img.Digest.Short(), strconv.Itoa(img.Layers), size(img.Size), ago(img.PulledAt)}
			}
			return c.table([]string{"IMAGE", "DIGEST", "LAYERS", "SIZE", "PULLED"}, rows)
		},
	}
}

func (c *cli) imageRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm REF|DIGEST", Short: "Remove an image that no app uses", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			if err := client.RemoveImage(cmd.Context(), absolute(a[0])); err != nil {
				return err
			}
			c.say("%s is removed", a[0])
			return nil
		},
	}
}

func (c *cli) imageCollectCommand() *cobra.Command {
	return &cobra.Command{
		Use: "gc", Short: "Remove everything that no app uses", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			var res api.GCResult
			if res, err = client.CollectImages(cmd.Context()); err != nil {
				return err
			}
			if c.json() {
				return c.print(res)
			}
			c.say("%d images and %d layers are removed, %s are free again", len(res.Images), res.Layers, size(res.Freed))
			return nil
		},
	}
}
