//! `orlop images` and `orlop pull`.

use super::{NodeSocket, table};
use anyhow::{Context, Result};
use orlop_proto::cri::{ImageSpec, ListImagesRequest, PullImageRequest};

pub async fn list(mut node: NodeSocket) -> Result<()> {
    let images = node.images.list_images(ListImagesRequest::default()).await?.into_inner().images;
    let mut rows: Vec<Vec<String>> = images
        .into_iter()
        .map(|image| {
            let name = image
                .repo_tags
                .first()
                .or_else(|| image.repo_digests.first())
                .cloned()
                .unwrap_or_else(|| "-".to_owned());
            let id = image.id.trim_start_matches("sha256:").chars().take(13).collect();
            vec![name, id, table::bytes(image.size)]
        })
        .collect();
    rows.sort();
    table::print(&["IMAGE", "ID", "SIZE"], &rows);
    Ok(())
}

pub async fn pull(mut node: NodeSocket, image: &str) -> Result<()> {
    let spec = ImageSpec { image: image.to_owned(), ..ImageSpec::default() };
    let request = PullImageRequest { image: Some(spec), ..PullImageRequest::default() };
    let reply = node.images.pull_image(request).await.with_context(|| format!("pull {image}"))?.into_inner();
    println!("{}", reply.image_ref);
    Ok(())
}
